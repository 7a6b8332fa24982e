"""Rows of tables with a head line."""

from __future__ import annotations

import csv
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Form:
    """How a table is written.

    Attributes:
        delimiter: Between columns.
        quotes: Whether quotation marks may surround a cell; ``None`` where files differ in that.
    """

    delimiter: str
    quotes: bool | None


QUOTED = Form(",", True)
UNSETTLED = Form("\t", None)  # those of pandas and spreadsheets have quotes, those of GLUE none


def table_rows(lines: Iterable[str], form: Form, place: str) -> list[dict[str, Any]]:
    """Return the rows of a table.

    Where it is not settled whether quotation marks surround cells, the reading is taken in which
    every row has the columns of the head line. If both have, cells are quoted unless one would
    then hold the delimiter, as rows do that an open quotation mark made one.

    Args:
        lines: Its lines, with their ends.
        form: How it is written.
        place: Where it comes from, for errors.

    Raises:
        ValueError: If two columns have one name, a row has other columns than the head line, or a
            quotation mark remains open.
    """
    if form.quotes is not None:
        return _read(lines, form, place)
    lines = list(lines)
    plain: ValueError | list[dict[str, Any]]
    try:
        plain = _read(lines, replace(form, quotes=False), place)
    except ValueError as error:
        plain = error
    try:
        quoted = _read(lines, replace(form, quotes=True), place)
    except ValueError as error:
        if isinstance(plain, ValueError):
            raise plain from error
        return plain
    is_run_together = any(form.delimiter in str(x) for row in quoted for x in row.values())
    return plain if is_run_together and not isinstance(plain, ValueError) else quoted


def _check_delimiter(names: Sequence[str], form: Form, place: str) -> None:
    """Refuse a head line that something else divides."""
    for other, what in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and other in names[0] and other != form.delimiter:
            raise ValueError(
                f"{place} has the single column {names[0]!r}: its columns are separated by {what}. "
                "Save it with commas, with tabs as .tsv, or as JSON lines"
            )


def _read(lines: Iterable[str], form: Form, place: str) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(
        lines,
        delimiter=form.delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if form.quotes else csv.QUOTE_NONE,
    )
    rows: list[dict[str, Any]] = []
    try:
        names = reader.fieldnames or ()
        _check_delimiter(names, form, place)
        for name, count in Counter(names).items():
            if name and count > 1:
                raise ValueError(f"{place} has {count} columns {name!r}; give each its own name")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{place}, line {reader.line_num}: expected {len(names)} columns, as in the "
                    "head line; JSON lines take texts with any characters"
                )
            rows.append(dict(row))
    except csv.Error as error:
        begin, end = reader.line_num + 1, reader.reader.line_num
        where = f"line {end}" if begin >= end else f"line {end}, of a row that begins in {begin}"
        raise ValueError(
            f"{place}, {where}: {error}; write a quotation mark within a cell twice, or save the "
            "data as JSON lines"
        ) from None
    return rows
