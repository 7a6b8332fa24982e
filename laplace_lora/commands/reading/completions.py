"""Which column holds the texts that follow the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_lora.commands.reading.columns import Columns, is_preference, listed, present_in
from laplace_lora.commands.reading.rows import Row

COMPLETIONS = ("completion", "answer", "response")
OPTION = "--completion-field"


def completion_column(
    rows: Sequence[Row],
    columns: Columns,
    asked: Columns,
    likelihood: str,
    known: Columns | None = None,
    is_needed: bool = True,
) -> str | None:
    """Return the column of completions, ``None`` where none is read.

    Without it a prompt would be taken for the whole text. A text column other than the fit's holds
    whole texts, if nothing says that something follows them.

    Args:
        rows: At least one.
        columns: What else is read.
        asked: Columns named in options.
        likelihood: Of the posterior.
        known: Columns that the posterior was fitted with.
        is_needed: Whether the command reads completions where the fit's texts had prompts.

    Raises:
        ValueError: If the completions of the fit's prompts are not found, or one is asked for and
            has no effect.
    """
    is_reward = likelihood == "reward_modeling"
    if likelihood != "language_modeling" and (not is_reward or is_preference(rows)):
        if asked.completion is not None:
            whose = "preference pairs have" if is_reward else f"a {likelihood} posterior reads"
            raise ValueError(f"{OPTION}: {whose} no completions")
        return None
    if asked.completion is not None:
        return asked.completion
    present = present_in(rows)
    free = [name for name in present if name not in vars(columns).values()]
    usual = [name for name in COMPLETIONS if name in free]
    if known is None:
        return next(iter(usual), None)
    if known.completion in free:
        return known.completion
    followed = known.text is not None if is_reward else known.completion is not None
    if not followed or asked.text not in (None, known.text):
        return next(iter(usual), None)
    if len(usual) == 1:
        return usual[0]
    if is_needed:
        raise ValueError(
            f"the posterior was fitted on texts after prompts, and which column follows "
            f"{columns.text!r} is not clear: the data have {listed(present)}. Name it by {OPTION}, "
            "or a column of whole texts by --text-field"
        )
    return None
