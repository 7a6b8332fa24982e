"""Rows of tables with a head line."""

from __future__ import annotations

import csv
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

BREAK = re.compile(r"\r\n|\r|\n")
DOUBLED = re.compile(r'"([^"]*"")+[^"]*"|""')  # a quoted cell with marks in it, or an empty one


def table_rows(lines: Iterable[str], delimiter: str, place: str) -> list[dict[str, Any]]:
    """Return the rows of a table.

    With tabs it is not settled whether quotation marks surround cells: files of pandas and
    spreadsheets have such marks, those of GLUE none. There the reading is taken in which every row
    has the columns of the head line. If both have, cells are quoted unless one would then hold the
    delimiter, as rows do that an open quotation mark made one. In a single column nothing tells
    such rows from a text of several lines, unless the file shows that it has quotes.

    Raises:
        ValueError: If two columns have one name, a row has other columns than the head line, a
            quotation mark remains open, or it may surround several rows or one.
    """
    if delimiter != "\t":
        return _read(lines, delimiter, place)
    lines = list(lines)
    readings, errors = [], []
    for quotes in (False, True):
        try:
            readings.append(_read(lines, delimiter, place, quotes))
        except ValueError as error:
            errors.append(error)
    if not readings:
        raise errors[0]
    if errors:
        return readings[0]
    plain, quoted = readings
    if any(delimiter in str(x) for row in quoted for x in row.values()):
        return plain
    if len(plain) != len(quoted) and not _shows_quotes(lines, quoted):
        raise ValueError(
            f"{place}, line {_first_over_lines(lines, delimiter)}: a quotation mark begins a text "
            "that may be one of several lines or several rows; give the data as .jsonl or .csv"
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


def _first_over_lines(lines: Sequence[str], delimiter: str) -> int:
    """Return in which line the first row of several lines begins."""
    reader, begin = csv.reader(lines, delimiter=delimiter, strict=True), 1
    for _ in reader:
        if reader.line_num > begin:
            break
        begin = reader.line_num + 1
    return begin


def _check_delimiter(names: Sequence[str], delimiter: str, place: str) -> None:
    """Refuse a head line that something else divides."""
    for other, what in ((";", "semicolons"), ("\t", "tabs")):
        if len(names) == 1 and other in names[0] and other != delimiter:
            raise ValueError(
                f"{place} has the single column {names[0]!r}: its columns are separated by {what}. "
                "Save it with commas, with tabs as .tsv, or as JSON lines"
            )


def _read(
    lines: Iterable[str], delimiter: str, place: str, quotes: bool = True
) -> list[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(
        lines,
        delimiter=delimiter,
        strict=True,
        quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
    )
    rows: list[dict[str, Any]] = []
    try:
        names = reader.fieldnames or ()
        _check_delimiter(names, delimiter, place)
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
