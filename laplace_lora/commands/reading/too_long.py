"""What is wrong with rows that have too many tokens, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_lora.commands.reading.adapter import Adapter
from laplace_lora.commands.reading.columns import CHOSEN, REJECTED

SHOWN = 5  # rows of an error


def too_long(number: int, length: int, limit: int, adapter: Adapter) -> str:
    """Return the error of a row that may not be cut.

    Args:
        number: The row's, from 1.
        length: Its tokens.
        limit: How many are read.
        adapter: The model.
    """
    return (
        f"row {number} has {length} tokens, more than {limit}; cutting it would change the "
        f"question. {_way_out(limit, adapter, 'it')}"
    )


def same_when_cut(numbers: Sequence[int], limit: int, adapter: Adapter) -> str:
    """Return the error of preference pairs of which only what is cut off differs.

    Args:
        numbers: Of their rows, from 1; at least one.
        limit: How many tokens of a text are read.
        adapter: The model.
    """
    rows = f"row {numbers[0]}: its"
    if len(numbers) > 1:
        some = ", ".join(map(str, numbers[:SHOWN])) + (", ..." if len(numbers) > SHOWN else "")
        rows = f"{len(numbers)} rows ({some}): their"
    return (
        f"{rows} {CHOSEN!r} and {REJECTED!r} texts differ only in what is cut off to leave {limit} "
        f"tokens, so that neither would be better. {_way_out(limit, adapter, 'them')}"
    )


def _way_out(limit: int, adapter: Adapter, what: str) -> str:
    if adapter.places is not None and limit >= adapter.places:
        return f"Shorten {what} or leave {what} out: the model has positions for no more tokens"
    is_declared = adapter.max_length is not None and limit >= adapter.max_length
    above = " above what tokenizer and configuration say" if is_declared else ""
    return f"Shorten {what}, leave {what} out, or raise --max-length{above}"
