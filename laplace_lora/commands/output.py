"""Results as JSON lines: a file that is there as a whole or not at all, or standard output."""

from __future__ import annotations

import gzip
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import click

from laplace_lora.commands.reading.folders import files_of_folder
from laplace_lora.commands.reading.rows import STANDARD, folder_and_split
from laplace_lora.storage.whole_files import whole_file

TABLES = (".csv", ".tsv", ".parquet", ".xlsx")


def check_writable(out: str, name: str = "--out", data: Sequence[str | None] = ()) -> None:
    """Refuse a file that could not be written or is data to be read, before any work.

    Args:
        out: The file, or ``-``.
        name: Of the option.
        data: Sources of rows, see `read_rows`.

    Raises:
        ValueError: If its folder is missing or may not be written to, it is one itself, or data
            would be lost.
    """
    if out == STANDARD:
        return
    path = Path(out).resolve()  # a link may lead to another folder
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"lies in {path.parent}, which does not exist"
        raise ValueError(f"{name} {out} {what}; give the name of a file")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} {out} is no file; {name} - writes to standard output")
    if Path(out).suffix.lower() in TABLES:
        raise ValueError(f"{name} {out}: results are JSON; name the file .json or .jsonl")
    check_folder(path.parent, f"{name} {out}")
    for source in data:
        if source is not None and path.exists() and _is_of(path, source):
            raise ValueError(
                f"{name} {out} belongs to the data {source}, which results would replace; give "
                "the name of another file"
            )


def _is_of(path: Path, source: str) -> bool:
    """Return whether a file is a source of rows, or one of those in the folder that is one."""
    if source == STANDARD:
        return _is_standard_input(path)
    read, _ = folder_and_split(source)
    files = files_of_folder(read) if read.is_dir() else [read]
    return any(file.exists() and path.samefile(file) for file in files)


def _is_standard_input(path: Path) -> bool:
    """Return whether standard input comes from this file, as behind ``<``."""
    try:
        return os.path.samestat(os.fstat(sys.stdin.fileno()), path.stat())
    except (AttributeError, OSError, ValueError):  # no standard input, or one of no file
        return False


def check_folder(folder: Path, what: str) -> None:
    """Refuse a folder, which need not exist yet, in which nothing may be written.

    Raises:
        ValueError: If it, or the first of those above it that exists, cannot be written to.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "which may not be written to" if there.is_dir() else "which is a file"
        raise ValueError(f"{what} would lie in {there}, {why}; choose another place by --out")


@contextmanager
def json_lines(out: str) -> Iterator[Callable[[Mapping[str, Any]], object]]:
    """Open a file for rows, see `as_json`; it appears under its name when all are written.

    Args:
        out: The file, or ``-`` for standard output, where rows appear as they come.
    """
    if out == STANDARD:  # bytes, as a console may have an encoding of its own
        yield lambda row: click.echo(as_json(row).encode())
        return
    with result_file(out) as file:
        yield lambda row: file.write(f"{as_json(row)}\n".encode())


@contextmanager
def result_file(out: str) -> Iterator[IO[bytes]]:
    """Open a file for results, compressed where its name says so; see `whole_file`.

    Args:
        out: The file. A link remains one, and what it leads to is written.
    """
    with ExitStack() as stack:
        file: Any = stack.enter_context(whole_file(Path(out).resolve()))
        if Path(out).suffix.lower() == ".gz":
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file))
        yield file


def as_json(value: Any, indent: int | None = None) -> str:
    """Return a value as JSON that any reader takes.

    Args:
        value: Dictionaries, lists, and what data have in their columns: dates as ISO 8601, numbers
            that are not finite as null, all else that JSON does not know as text.
        indent: Spaces before what lies within; one line if ``None``.
    """
    return json.dumps(_plain(value), ensure_ascii=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
