"""Rows of data from files, folders and standard input, as dictionaries."""

from __future__ import annotations

import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from laplace_lora.commands.reading.folders import rows_of_folder
from laplace_lora.commands.reading.tables import table_rows

Row = dict[str, Any]

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz")
TABLES = {".csv": ",", ".csv.gz": ",", ".tsv": "\t"}  # and what divides their columns
STANDARD = "-"
EXAMPLE = '{"text": "..."}'  # of a line of JSON


def read_rows(source: str, split: str | None = None) -> list[Row]:
    """Read all rows of a data set, see `read_named`."""
    return read_named(source, split)[0]


def read_named(source: str, split: str | None = None) -> tuple[list[Row], dict[str, list[str]]]:
    """Read all rows of a data set, and what it says of its classes.

    Args:
        source: A ``.jsonl`` file (``.ndjson``, ``.jsonl.gz``), a ``.csv`` file (``.csv.gz``,
            ``.tsv``) with a head line, a data set folder (what ``save_to_disk`` wrote, or files as
            on the hub), alone or as ``folder:split``, or ``-`` for JSON lines on standard input.
        split: Of a folder with several, where the source names none.

    Returns:
        The rows; and, by column, the names of the classes that its numbers stand for, as only data
        set folders have them.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If a folder is given and ``datasets`` is not installed.
        ValueError: If a line cannot be read, there are no rows, the file's kind is unknown, or the
            split is.
    """
    path, named = folder_and_split(source)
    split = split if named is None else named
    if split is not None and not path.is_dir():
        raise ValueError(f"--split {split}: {source} is no data set folder")
    if source != STANDARD and not path.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    kind = path.name.lower()
    classes: dict[str, list[str]] = {}
    if source == STANDARD:
        with _readable("standard input"), _standard_input() as lines:
            rows = list(_json_lines(lines, "standard input"))
    elif path.is_dir():
        rows, classes = rows_of_folder(path, split)
    elif kind.endswith(JSON_LINES):
        with _readable(source), _opened(path) as lines:
            rows = list(_json_lines(lines, source))
    elif kind.endswith(tuple(TABLES)):
        delimiter = next(d for suffix, d in TABLES.items() if kind.endswith(suffix))
        with _readable(source), _opened(path) as lines:
            rows = table_rows(lines, delimiter, source)
    else:
        kinds = ", ".join((*JSON_LINES, *TABLES))
        raise ValueError(f"{source}: expected a file in {kinds}, a data set folder, or -")
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows, classes


def folder_and_split(source: str) -> tuple[Path, str | None]:
    """Return the file or folder of a source of rows, and the split that it names, if any."""
    path = Path(source)
    folder, colon, name = source.rpartition(":")
    if colon and not path.exists() and Path(folder).is_dir():
        return Path(folder), name
    return path, None


def _opened(path: Path) -> TextIO:
    # A byte order mark is no part of the first column's name.
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


@contextmanager
def _readable(place: str) -> Iterator[None]:
    """Say of what cannot be read where it is, and what to do."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place} is not in UTF-8: {error.reason}, {error.object[error.start]:#x}; save it as "
            "UTF-8, or convert it (iconv)"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{place} is no whole gzip file: {error}") from None


@contextmanager
def _standard_input() -> Iterator[TextIO]:
    """Open standard input as files are opened: UTF-8, whatever the terminal's encoding."""
    lines = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline="")
    try:
        yield lines
    finally:
        lines.detach()


def _keyed(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object's values by name.

    Raises:
        KeyError: If a name comes twice, of which `json` would keep the last.
    """
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise KeyError(name)
    return dict(pairs)


def _json_lines(lines: Iterable[str], place: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row, why = json.loads(line, object_pairs_hook=_keyed), ""
        except json.JSONDecodeError as error:
            row, why = None, f" ({error.msg})"
        except KeyError as error:
            raise ValueError(f"{place}, line {number}: {error} is named twice") from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{place}, line {number}: expected a JSON object, such as {EXAMPLE}, got "
                f"{line.strip()[:60]}{why}"
            )
        yield row
