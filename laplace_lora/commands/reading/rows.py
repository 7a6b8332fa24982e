"""Rows of data from files, folders and standard input, as dictionaries."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

Row = dict[str, Any]

JSON_LINES = (".jsonl", ".ndjson", ".jsonl.gz")
TABLES = {".csv": ",", ".csv.gz": ",", ".tsv": "\t"}
STANDARD = "-"
EXAMPLE = '{"text": "..."}'  # of a line of JSON


def read_rows(source: str, split: str | None = None) -> list[Row]:
    """Read all rows of a data set.

    Args:
        source: A ``.jsonl`` file (``.ndjson``, ``.jsonl.gz``), a ``.csv`` file (``.csv.gz``,
            ``.tsv``) with a head line, a data set folder (what ``save_to_disk`` wrote, or files as
            on the hub), alone or as ``folder:split``, or ``-`` for JSON lines on standard input.
        split: Of a folder with several, where the source names none.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If a folder is given and ``datasets`` is not installed.
        ValueError: If a line cannot be read, there are no rows, the file's kind is unknown, or the
            split is.
    """
    path = Path(source)
    folder, colon, name = source.rpartition(":")
    if colon and not path.exists() and Path(folder).is_dir():
        path, split = Path(folder), name
    if split is not None and not path.is_dir():
        raise ValueError(f"--split {split}: {source} is no data set folder")
    if source != STANDARD and not path.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    if source == STANDARD:
        with _readable("standard input"), _standard_input() as lines:
            rows = list(_json_lines(lines, "standard input"))
    elif path.is_dir():
        rows = _of_folder(path, split)
    elif path.name.endswith(JSON_LINES):
        with _readable(source), _opened(path) as lines:
            rows = list(_json_lines(lines, source))
    elif path.name.endswith(tuple(TABLES)):
        delimiter = next(d for suffix, d in TABLES.items() if path.name.endswith(suffix))
        with _readable(source), _opened(path) as lines:
            rows = list(_table(lines, delimiter, source))
    else:
        kinds = ", ".join((*JSON_LINES, *TABLES))
        raise ValueError(f"{source}: expected a file in {kinds}, a data set folder, or -")
    if not rows:
        raise ValueError(f"{source} has no rows")
    return rows


def _opened(path: Path) -> TextIO:
    # A byte order mark is no part of the first column's name.
    if path.suffix == ".gz":
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


def _json_lines(lines: Iterable[str], place: str) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{place}, line {number}: expected a JSON object, such as {EXAMPLE}, got "
                f"{line.strip()[:60]} ({error.msg})"
            ) from None
        if not isinstance(row, dict):
            raise ValueError(
                f"{place}, line {number}: expected a JSON object, such as {EXAMPLE}, got "
                f"{line.strip()[:60]}"
            )
        yield row


def _table(lines: TextIO, delimiter: str, place: str) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for name, count in Counter(reader.fieldnames or ()).items():
            if name and count > 1:
                raise ValueError(f"{place} has {count} columns {name!r}; give each its own name")
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{place}, line {reader.line_num}: expected {len(reader.fieldnames or ())} "
                    "columns, as in the head line"
                )
            yield dict(row)
    except csv.Error as error:
        raise ValueError(f"{place}, line {reader.line_num}: {error}") from None


def _of_folder(path: Path, split: str | None) -> list[Row]:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{path} is a folder: reading data set folders requires `pip install datasets`"
        ) from None
    with _quietly(datasets):
        written = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
        data = datasets.load_from_disk(str(path)) if written else datasets.load_dataset(str(path))
    if isinstance(data, datasets.DatasetDict):
        names = list(data)
        if split is None and len(names) > 1:
            raise ValueError(
                f"{path} has the splits {', '.join(names)}; choose one: {path}:{names[0]}"
            )
        if split is not None and split not in names:
            raise ValueError(f"{path} has the splits {', '.join(names)}, and no {split}")
        data = data[names[0] if split is None else split]
    elif split is not None:
        raise ValueError(f"{path} has no splits, and so no {split}")
    return [dict(row) for row in data.with_format(None)]  # plain values, not tensors


@contextmanager
def _quietly(datasets: Any) -> Iterator[None]:
    """Switch the library's progress bars off where this package's are."""
    from laplace_lora.data.loaders import OFF, VARIABLE

    change = os.environ.get(VARIABLE) in OFF and not datasets.are_progress_bars_disabled()
    if change:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if change:
            datasets.enable_progress_bars()
