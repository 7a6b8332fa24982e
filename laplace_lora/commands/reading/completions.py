"""Which column holds the texts that follow the prompts, or seems to hold second texts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from laplace_lora.commands.reading.columns import (
    SECOND,
    TEXTS,
    Columns,
    is_preference,
    listed,
    present_in,
)
from laplace_lora.commands.reading.rows import Row

COMPLETIONS = ("completion", "answer", "response")
WHOLE = ("text", "sentence", "messages")  # of which nothing that follows is expected
BEGUN = ("prompt", "question")  # which something follows
OPTION = "--completion-field"
NUMBERED = re.compile(r"(.+?)(?:[_-]b|[_-]?2)", re.IGNORECASE)  # text_b, question2, sentence_2
FIRST = ("1", "_1", "-1", "_a", "-a")
STEMS = (*TEXTS, *SECOND)


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
    any column. A text column other than the fit's is read as in a fit. Some commands need none.

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


def check_second_text(
    rows: Sequence[Row], columns: Columns, asked: Columns, likelihood: str
) -> None:
    """Refuse to read one text where a column that nobody has named looks like a second one.

    Raises:
        ValueError: If there is such a column.
    """
    is_decided = columns.text is None or asked.text is not None or columns.pair is not None
    if is_decided or likelihood == "reward_modeling":  # which reads completions
        return
    free = [name for name in present_in(rows) if name not in vars(columns).values()]
    for name in free:
        if _is_second(name, columns.text, free) and any(_is_text(r.get(name)) for r in rows):
            raise ValueError(
                f"the column {name!r} may hold a second text, which a model of pairs reads: say "
                f"--text-field {columns.text} --pair-field {name} for pairs, or --text-field "
                f"{columns.text} alone for single texts"
            )


def _is_second(name: str, text: str | None, free: Sequence[str]) -> bool:
    """Return whether one of the free columns is named like the second of two texts."""
    found = NUMBERED.fullmatch(name)
    if found is None:
        return name in COMPLETIONS
    stem = found[1]
    return stem.lower() in STEMS or any(stem + ending in (text, *free) for ending in FIRST)


def _is_text(value: object) -> bool:
    """Return whether a value is a text, not an address, or a number as a table writes it."""
    if not isinstance(value, str) or value.strip().lower() == "nan":
        return False
    return re.fullmatch(r"[\s\d.,:eE+-]*|\w+://\S*", value) is None
