"""Which likelihood a fit has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laplace_lora.commands.reading.adapter import CAUSAL, HEAD, Adapter
from laplace_lora.commands.reading.columns import Columns, is_preference
from laplace_lora.commands.reading.rows import Row
from laplace_lora.likelihoods.classification import MULTILABEL_PROBLEM

WITH_CLASSES = ("classification", "multilabel")
WITHOUT_LABELS = ("reward_modeling", "language_modeling")
PROBLEMS: dict[str | None, str] = {  # as Hugging Face's configurations call them
    "regression": "regression",
    "single_label_classification": "classification",
    MULTILABEL_PROBLEM: "multilabel",
}


def likelihood_asked(
    adapter: Adapter, rows: Sequence[Row], columns: Columns, options: dict[str, Any]
) -> str:
    """Return the likelihood that is asked for, or that fits model and data.

    Raises:
        ValueError: If the model has no such likelihood, or none without answers.
    """
    asked, targets = options.get("likelihood"), options.get("targets")
    possible: tuple[str, ...]
    if adapter.kind == HEAD:
        if targets:
            raise ValueError("--target is for language models; this model has a head of its own")
        several = adapter.outputs > 1
        default = _likelihood_of_head(adapter)
        label = columns.label
        has_lists = label is not None and any(isinstance(row.get(label), list) for row in rows)
        if several and has_lists and adapter.problem_type not in PROBLEMS:
            default = "multilabel"
        if not several and is_preference(rows):
            default = "reward_modeling"
        possible = (
            ("classification", "multilabel", "regression")
            if several
            else ("multilabel", "regression", "reward_modeling")
        )
    elif targets:
        default, possible = "classification", ("classification",)
    elif adapter.kind == CAUSAL:
        default, possible = "language_modeling", ("language_modeling",)
    else:
        raise ValueError("an encoder-decoder needs --target: its answers, one token each")
    if asked is not None and asked not in possible:
        hint = ""
        if asked == "classification" and adapter.kind == CAUSAL:
            hint = "; name the answers by --target yes no"
        raise ValueError(
            f"--likelihood {asked} does not fit this model; possible: {', '.join(possible)}{hint}"
        )
    return asked or default


def _likelihood_of_head(adapter: Adapter) -> str:
    """Return the likelihood of a model with a head, by its configuration and its outputs."""
    if adapter.outputs == 1 and adapter.problem_type != MULTILABEL_PROBLEM:
        return "regression"
    return PROBLEMS.get(adapter.problem_type, "classification")
