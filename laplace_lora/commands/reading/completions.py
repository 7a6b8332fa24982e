"""Which column holds the texts that follow the prompts."""

from __future__ import annotations

from collections.abc import Sequence

from laplace_lora.commands.reading.columns import Columns, is_preference, listed, present_in
from laplace_lora.commands.reading.rows import Row

COMPLETIONS = ("completion", "answer", "response")
WHOLE = ("text", "sentence", "messages")  # of which nothing that follows is expected
BEGUN = ("prompt", "question")  # which something follows
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

    Without it a prompt would be taken for the whole text. Whole texts of a fit remain whole beside
    any column. A text column other than the fit's is read as in a fit.

    Args:
        rows: At least one.
        columns: What else is read.
        asked: Columns named in options.
        likelihood: Of the posterior.
        known: Columns that the posterior was fitted with.
        is_needed: Whether the command reads completions.

    Raises:
        ValueError: If the completions of the fit's prompts are not found, texts may be whole or
            prompts, or a column is asked for and has no effect.
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
    known = known or Columns()
    if known.completion in free:
        return known.completion
    if known.text is None or asked.text not in (None, known.text):
        return _new(usual, free, columns.text, asked.text, is_needed)
    if known.completion is None and not is_reward:
        return None
    if len(usual) == 1:
        return usual[0]
    if is_needed:
        raise ValueError(
            f"the posterior was fitted on texts after prompts, and which column follows "
            f"{columns.text!r} is not clear: the data have {listed(present)}. Name it by {OPTION}, "
            "or a column of whole texts by --text-field"
        )
    return None


def _new(
    usual: Sequence[str], free: Sequence[str], text: str | None, asked: str | None, is_needed: bool
) -> str | None:
    """Return the first column with a usual name, if it may follow the texts."""
    if usual and text not in WHOLE:
        return usual[0]
    if asked is not None or not is_needed or not (usual or (free and text in BEGUN)):
        return None
    if not usual:
        raise ValueError(
            f"the column {text!r} may be followed by one of {listed(free)}: name that by {OPTION}, "
            f"or say --text-field {text} for whole texts"
        )
    raise ValueError(
        f"the column {text!r} may be whole texts, or what {usual[0]!r} follows: say --text-field "
        f"{text} for whole texts, {OPTION} {usual[0]} for the others"
    )
