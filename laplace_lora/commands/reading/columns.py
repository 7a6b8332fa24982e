"""Which columns of the data hold what."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from laplace_lora.commands.reading.messages import are_written_out, check_contents, is_messages
from laplace_lora.commands.reading.rows import Row

TEXTS = ("text", "prompt", "messages", "sentence", "question")
PAIRS = ("text_pair",)
SECOND = ("text2", "sentence1", "sentence2", "premise", "hypothesis", "context", "passage")
LABELS = ("label", "labels")
CHOSEN, REJECTED = "chosen", "rejected"  # of preference pairs, as TRL names them


@dataclass(frozen=True)
class Columns:
    """Names of columns; ``None`` where the data have no such column.

    Attributes:
        text: Texts, prompts or lists of messages.
        pair: Second texts.
        completion: What follows the prompts.
        label: Labels.
    """

    text: str | None = None
    pair: str | None = None
    completion: str | None = None
    label: str | None = None


def columns_of(rows: Sequence[Row], asked: Columns, known: Columns | None = None) -> Columns:
    """Return the columns to read: those asked for, those of the fit, or those with usual names.

    That of completions is only the one asked for; for others see `completion_column`. Labels may be
    missing where columns are known from a fit.

    Rows need not all have the same columns: it is there if one of them has it.

    Raises:
        ValueError: If a column that was asked for, or that of the fit's texts, is missing, or
            nobody says which of several columns holds the texts.
    """
    present = present_in(rows)
    for name in (asked.text, asked.pair, asked.completion, asked.label):
        if name is not None and name not in present:
            raise ValueError(f"there is no column {name!r}; the data have {listed(present)}")
    if known is not None:
        for role in ("text", "pair"):
            name = getattr(known, role)
            if name is not None and name not in present and getattr(asked, role) is None:
                raise ValueError(
                    f"the posterior was fitted on the column {name!r}; the data have "
                    f"{listed(present)}. Name the column by --{role}-field"
                )
    free = [name for name in present if name not in vars(asked).values()]
    if known is None and asked.text is None:
        _check_one_text(free)
    choices = {"text": TEXTS, "pair": PAIRS, "label": LABELS}
    found: dict[str, str | None] = {"completion": asked.completion}
    for role, usual in choices.items():
        of_fit = getattr(known, role) if known is not None else None
        # A second text that the fit did not read would make another input.
        is_new = of_fit is None and role != "pair"
        candidates = usual if known is None or is_new or role == "label" else ()
        of_others = {} if known is None else {**vars(known), role: None}
        unused = [name for name in candidates if name not in of_others.values()]
        found[role] = getattr(asked, role) or next(
            (name for name in (of_fit, *unused) if name in free), None
        )
    return Columns(**found)


def _check_one_text(free: Sequence[str]) -> None:
    """Refuse to choose among several columns that may be the texts."""
    texts = [name for name in free if name in (*TEXTS, *SECOND)]
    if len(texts) > 1:
        raise ValueError(
            f"the data have several columns of texts, {listed(texts)}; name the one to read by "
            "--text-field, and that of second texts, if there are any, by --pair-field"
        )


def present_in(rows: Sequence[Row]) -> list[str]:
    """Return the names of all columns, in their order; a row may lack some of them."""
    return list(dict.fromkeys(name for row in rows for name in row))


def is_preference(rows: Sequence[Row]) -> bool:
    """Return whether rows are preference pairs: whether these columns are there."""
    return {CHOSEN, REJECTED} <= set(present_in(rows))


def are_pairs(rows: Sequence[Row], likelihood: str) -> bool:
    """Return whether rows are preference pairs, and a reward model reads them."""
    return likelihood == "reward_modeling" and is_preference(rows)


def text_column(rows: Sequence[Row], columns: Columns, likelihood: str) -> str | None:
    """Return the column of what ends texts: of a reward model's pairs that of one half."""
    return CHOSEN if are_pairs(rows, likelihood) else columns.text


def has_conversations_only(rows: Sequence[Row], name: str | None) -> bool:
    """Return whether there are rows, and all have a list of messages in this column."""
    return bool(rows) and name is not None and all(isinstance(row.get(name), list) for row in rows)


def cell(row: Row, name: str | None, number: int, what: str, option: str) -> Any:
    """Return a row's value in a column; errors say what it holds, and the option that names it.

    Raises:
        ValueError: If there is no such column, or the row has nothing in it.
    """
    if name is None:
        raise ValueError(
            f"no column for the {what}: the data have {listed(row)}; name it by {option}"
        )
    value = row.get(name)
    if value is None or value == "":
        state = "is empty" if name in row else "is missing"
        raise ValueError(f"row {number} has no {what}: its column {name!r} {state}")
    return value


def text_cell(row: Row, name: str | None, number: int, what: str, option: str) -> Any:
    """Return a row's text or messages, see `cell`.

    Raises:
        ValueError: If there is no such column, or the row has nothing in it, or what is neither.
    """
    value = cell(row, name, number, what, option)
    check_text(value, number, what, name)
    return value


def check_text(value: Any, number: int, what: str, name: str | None) -> None:
    """Refuse what is neither a text nor a list of messages.

    A number is not taken for its digits: there are several ways of writing it, such as 7 and 007,
    and the model has read one of them. Messages of a table, which has only texts, are not read.

    Raises:
        ValueError: If it is neither, or a text that stands for messages, or not all of a text are
            characters, or a message has no content.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"row {number}: its column {name!r} holds half of a character as the {what} "
                "(a surrogate, as a text that was cut within an emoji has); remove it"
            ) from None
        if are_written_out(value, name):
            raise ValueError(
                f"row {number}: its column {name!r} holds messages as a text, {value[:60]!r}, "
                "which would be read as a plain one; a table has no lists: save the data as JSON "
                "lines, or as a data set folder of parquet files"
            )
        return
    if is_messages(value):
        check_contents(value, number, name)
        return
    written = json.dumps(value, default=str)[:60]
    raise ValueError(
        f"row {number}: its column {name!r} holds {written} as the {what}, which is neither a text "
        'nor a list of messages; put a text in quotes, such as {"text": "42"}'
    )


def label_cells(rows: Sequence[Row], name: str | None) -> list[Any]:
    """Return the label of every row.

    Raises:
        ValueError: If there is no such column, or a row has nothing in it.
    """
    return [cell(row, name, n, "label", "--label-field") for n, row in enumerate(rows, start=1)]


def listed(names: Iterable[str]) -> str:
    """Return names as an error lists them."""
    return ", ".join(map(repr, names))
