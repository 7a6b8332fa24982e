"""Say which columns are read and which are not, and refuse to leave out a second text unasked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from laplace_lora.adapters.selection import listed
from laplace_lora.commands.reading.columns import (
    CHOSEN,
    REJECTED,
    TEXTS,
    Columns,
    are_pairs,
    present_in,
)
from laplace_lora.commands.reading.completions import COMPLETIONS
from laplace_lora.commands.reading.messages import (
    ASKING,
    ASSISTANT,
    has_role,
    is_messages,
)
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.rows import Row

NUMBERED = re.compile(r"(.+?)(?:[_-]b|[_-]?2)", re.IGNORECASE)  # text_b, question2, sentence_2
FIRST = ("1", "_1", "-1", "_a", "-a")
STEMS = (*TEXTS, "premise", "hypothesis", "context", "passage")
SHOWN = 8


def check_second_text(
    rows: Sequence[Row], columns: Columns, asked: Columns, likelihood: str
) -> None:
    """Refuse to read one text where a column that nobody has named looks like a second one.

    Args:
        rows: The data of a model with a head; may be empty.
        columns: What is read.
        asked: Columns named in options.
        likelihood: Of the posterior.

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


def columns_said(plan: Plan, rows: Sequence[Row]) -> str:
    """Return which columns are read, and which are not, as a sentence."""
    columns, likelihood = plan.columns, plan.likelihood
    texts = [columns.text, columns.pair, columns.completion]
    if are_pairs(rows, likelihood):
        texts += [CHOSEN, REJECTED]
    read = [repr(name) for name in texts if name is not None]
    has_labels = likelihood not in ("reward_modeling", "language_modeling")
    label = columns.label if has_labels else None
    if label is not None:
        read.append(f"label {label!r}")
    left = [n for n in present_in(rows) if n not in (*texts, label)]
    said = f"Reads {' and '.join(read)}"
    if left:
        said = f"{said}; {listed(left, SHOWN)} {'is' if len(left) == 1 else 'are'} not read"
    count = sum(_has_earlier_answers(columns, row) for row in rows)
    if likelihood == "language_modeling" and count:
        said = (
            f"{said}. In {count} of {len(rows)} conversations the assistant answers several times: "
            "the last answer of each is scored, earlier ones are read as context"
        )
    return f"{said}."


def prompts_said(plan: Plan, rows: Sequence[Row]) -> str | None:
    """Return which column beside preference pairs may hold prompts and is not read, as a sentence.

    Args:
        plan: How rows are read.
        rows: Preference pairs of a reward model.

    Raises:
        ValueError: If the answers of a pair, messages, would then stand alone.
    """
    left = [name for name in TEXTS if name in present_in(rows)]
    if plan.columns.text is not None or not left:
        return None
    said = f"{left[0]!r} is not read: the fit's pairs had none; --text-field {left[0]} reads it"
    for number, row in enumerate(rows, start=1):
        for name in (CHOSEN, REJECTED):
            if _begins_with_answer(row.get(name)):
                raise ValueError(
                    f"row {number}: the messages in its column {name!r} begin with an answer, and "
                    f"{said}. If they are all that there is to read, leave that column out"
                )
    return f"{said}."


def _begins_with_answer(content: Any) -> bool:
    return is_messages(content) and not has_role(content[0], ASKING)


def _has_earlier_answers(columns: Columns, row: Row) -> bool:
    """Return whether a conversation has answers of the assistant's before its last message."""
    messages = row.get(columns.text or "")
    is_whole = columns.completion is None or row.get(columns.completion) is None
    if not isinstance(messages, list) or not is_whole:
        return False
    return any(message["role"] == ASSISTANT for message in messages[:-1])
