"""Preference pairs: what their halves must have in common and what not, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import DataCollatorWithPadding

from laplace_lora.commands.reading.columns import CHOSEN, REJECTED


def check_one_form(contents: Mapping[str, Any], number: int) -> None:
    """Refuse a pair of a text and messages, which alone go through the chat template.

    Raises:
        ValueError: If only one of them are messages.
    """
    if isinstance(contents[CHOSEN], list) != isinstance(contents[REJECTED], list):
        raise ValueError(
            f"row {number}: of {CHOSEN!r} and {REJECTED!r} one is a text and the other messages, "
            "which go through the chat template; write both in one way"
        )


def lengths_of(example: Mapping[str, Any]) -> list[int]:
    """Return how many tokens both halves of a pair have, or a text alone."""
    texts = [example[half] for half in (CHOSEN, REJECTED) if half in example] or [example]
    return [len(text["input_ids"]) for text in texts]


def are_same(halves: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether both halves have the same tokens."""
    return bool(halves[CHOSEN]["input_ids"] == halves[REJECTED]["input_ids"])


def padded_pairs(
    pad: DataCollatorWithPadding, pairs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a batch under the names of TRL's reward trainer: ``input_ids_chosen``, and so on."""
    batch: dict[str, Any] = {}
    for half in (CHOSEN, REJECTED):
        padded = pad([pair[half] for pair in pairs])
        batch |= {f"{name}_{half}": value for name, value in padded.items()}
    return batch
