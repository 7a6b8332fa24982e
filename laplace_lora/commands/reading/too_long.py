"""Texts that have too many tokens: cut, or refused with what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laplace_lora.commands.reading.adapter import Adapter
from laplace_lora.commands.reading.columns import CHOSEN, REJECTED

SHOWN = 5  # rows of an error


def cut_to(limit: int, text: str, second: str | None, tokenizer: Any, eos: bool) -> dict[str, Any]:
    """Return the tokens of one text or two that have too many; with ``eos`` it ends them.

    Raises:
        ValueError: If nothing is left of a text, or of one of two.
    """
    own = tokenizer.num_special_tokens_to_add(pair=second is not None) + eos
    found = dict(tokenizer(text, second, truncation=True, max_length=limit))
    least = own + 1 + (second is not None)
    if limit < least or len(found["input_ids"]) > limit:
        what = "a text" if second is None else "two texts"
        raise ValueError(
            f"--max-length {limit} leaves no room for {what}: {own} tokens are those that the "
            f"tokenizer puts around them; give {least} or more, or leave it out"
        )
    if eos:
        found["input_ids"][-1] = tokenizer.eos_token_id
    return found


def too_long(number: int, length: int, limit: int, adapter: Adapter) -> str:
    """Return the error of a row that may not be cut."""
    return (
        f"row {number} has {length} tokens, more than {limit}; cutting it would change the "
        f"question. {_way_out(limit, adapter, 'it')}"
    )


def same_when_cut(numbers: Sequence[int], limit: int, adapter: Adapter) -> str:
    """Return the error of preference pairs of which only what is cut off differs."""
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
