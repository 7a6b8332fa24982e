"""Say how many texts are cut, which changes what a model is asked without an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from laplace_lora.commands.reading.adapter import HEAD
from laplace_lora.commands.reading.columns import CHOSEN, REJECTED
from laplace_lora.commands.reading.inputs import Example, Inputs
from laplace_lora.commands.reading.rows import Row


def cuts_said(
    inputs: Inputs, examples: Any, rows: Sequence[Row], source: str | None = None
) -> str | None:
    """Return how many texts are cut, as a sentence; ``None`` if none is.

    Args:
        inputs: How rows are read.
        examples: What became of the rows.
        rows: The data.
        source: The option and its file, where it is not the first one.
    """
    limit = inputs.plan.max_length
    if limit is None or inputs.adapter.kind != HEAD:  # others are refused
        return None
    whole, count = Inputs(inputs.adapter, replace(inputs.plan, max_length=None)), 0
    for n, (row, example) in enumerate(zip(rows, examples, strict=True), start=1):
        if max(map(_length, _texts(example))) < limit:
            continue
        uncut = whole.preference(row, n) if CHOSEN in example else whole.text(row, n)
        count += sum(_length(text) > limit for text in _texts(uncut))
    if not count:
        return None
    total = sum(len(_texts(example)) for example in examples)
    texts = "texts" if source is None else f"texts of {source}"
    return f"{count} of {total} {texts} {'is' if count == 1 else 'are'} cut to {limit} tokens."


def _texts(example: Example) -> list[Example]:
    """Return the halves of a pair, or a text alone."""
    return [example[name] for name in (CHOSEN, REJECTED) if name in example] or [example]


def _length(text: Example) -> int:
    return len(text["input_ids"])
