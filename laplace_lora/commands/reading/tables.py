"""Rows of tables with a head line."""

from __future__ import annotations

import csv
import re
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


BREAK = re.compile(r"\r\n|\r|\n")
DOUBLED = re.compile(r'"([^"]*"")+[^"]*"|""')  # a quoted cell with marks in it, or an empty one
QUOTED = Form(",", True)
UNSETTLED = Form("\t", None)  # those of pandas and spreadsheets have quotes, those of GLUE none


def table_rows(lines: Iterable[str], form: Form, place: str) -> list[dict[str, Any]]:
    """Return the rows of a table.

    Where it is not settled whether quotation marks surround cells, the reading is taken in which
    every row has the columns of the head line. If both have, cells are quoted unless one would
    then hold the delimiter, as rows do that an open quotation mark made one. In a single column
    nothing tells such rows from a text of several lines, unless the file shows that it has quotes.

    Raises:
        ValueError: If two columns have one name, a row has other columns than the head line, a
            quotation mark remains open, or it may surround several rows or one.
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
    if isinstance(plain, ValueError):
        return quoted
    if any(form.delimiter in str(x) for row in quoted for x in row.values()):
        return plain
    if len(plain) != len(quoted) and not _shows_quotes(lines, quoted):
        raise ValueError(
            f"{place}, line {_first_over_lines(lines, form)}: a quotation mark begins a text that "
            "may be one of several lines or several rows; give the data as .jsonl or .csv"
        )
    return quoted


def _shows_quotes(lines: Sequence[str], rows: Sequence[dict[str, Any]]) -> bool:
    """Return whether the lines of a single column have marks as only quoted cells have them."""
    if lines[0].startswith('"') or any(DOUBLED.fullmatch(line.rstrip("\r\n")) for line in lines):
        return True
    over_lines = [str(x) for row in rows for x in row.values() if BREAK.search(str(x))]
    if any('"' in text for text in over_lines):  # which are written twice
        return True
    within = Counter(end for text in over_lines for end in BREAK.findall(text))
    between = Counter(end for line in lines for end in BREAK.findall(line)) - within
    return not within.keys() & between.keys()  # a writer ends all rows alike


def _first_over_lines(lines: Sequence[str], form: Form) -> int:
    """Return in which line the first row of several lines begins."""
    reader, begin = csv.reader(lines, delimiter=form.delimiter, strict=True), 1
    for _ in reader:
        if reader.line_num > begin:
            break
        begin = reader.line_num + 1
    return begin


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
