"""Rows of data set folders."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

TEXT = "text"
KINDS = {  # of data files that `datasets` reads, which takes one kind of a folder
    ".csv": "CSV",
    ".tsv": "TSV",
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".txt": TEXT,
}
STATES = ("state.json", "dataset_dict.json", "dataset_info.json")  # what `save_to_disk` writes
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
UNNAMED = (".zip", ".geoparquet", ".gpq")  # which `datasets` reads beside data of their kind
NOTICES = ("license", "licence", "notice", "readme", "requirements")  # as .txt beside data
CARD = "README.md"


def rows_of_folder(
    path: Path, split: str | None
) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Return the rows of a data set folder, and the names of the classes that columns number.

    Args:
        path: What ``save_to_disk`` wrote, or files as on the hub.
        split: Its name, where there are several.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If there is no such split, none of several is named, or some files would not be
            read.
    """
    datasets = _datasets(path)
    with _quietly(datasets):
        if _is_written(path):
            data = datasets.load_from_disk(str(path))
        else:
            data = datasets.load_dataset(str(path), data_files=_asked_for(path))
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
    numbered = {name: _one_of(feature) for name, feature in data.features.items()}
    named = {
        name: list(f.names) for name, f in numbered.items() if isinstance(f, datasets.ClassLabel)
    }
    return [dict(row) for row in data.with_format(None)], named  # plain values, not tensors


def _one_of(feature: Any) -> Any:
    """Return what a column holds, or where it holds lists, what these hold."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)


def files_of_folder(path: Path) -> list[Path]:
    """Return the files that hold a folder's data, or may.

    Raises:
        ImportError: If ``datasets`` is not installed.
    """
    if _is_written(path):
        return [file for file in path.rglob("*") if file.suffix == ".arrow" or file.name in STATES]
    return [file for files in _without_notices(_of_splits(path)).values() for file in files]


def _of_splits(path: Path) -> dict[str, list[Path]]:
    """Return the files that `datasets` finds, by split."""
    datasets = _datasets(path)
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        if _has_card(path):
            found = datasets.load_dataset_builder(str(path)).config.data_files or {}
        else:
            found = DataFilesDict.from_patterns(get_data_patterns(str(path)), str(path))
    except (FileNotFoundError, ValueError):  # `datasets` says later what is missing
        return {}
    return {str(split): [Path(str(name)) for name in files] for split, files in found.items()}


def _without_notices(of_splits: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Return files without licences and the like, which beside data of another kind are none."""
    if {_kind(file) for files in of_splits.values() for file in files} <= {None, TEXT}:
        return of_splits
    left = {
        split: [file for file in files if _kind(file) != TEXT or file.stem.lower() not in NOTICES]
        for split, files in of_splits.items()
    }
    return {split: files for split, files in left.items() if files}


def _kind(file: Path) -> str | None:
    suffix = Path(file.stem).suffix if file.suffix.lower() in PACKED else file.suffix
    return KINDS.get(suffix.lower())


def _datasets(path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{path} is a folder: reading data set folders requires `pip install datasets`"
        ) from None
    return datasets


def _is_written(path: Path) -> bool:
    """Return whether ``save_to_disk`` has written a folder."""
    return any((path / name).is_file() for name in STATES[:2])


def _has_card(path: Path) -> bool:
    """Return whether a folder says itself which files are its data."""
    card = path / CARD
    if not card.is_file():
        return False
    text = card.read_text(encoding="utf-8", errors="replace")
    said = re.match(r"\s*---\s*\n(.*?)\n---", text, re.DOTALL)
    return said is not None and "data_files" in said[1]


def _asked_for(path: Path) -> dict[str, list[str]] | None:
    """Return which files `datasets` is to read, ``None`` for those that it finds itself.

    Raises:
        ValueError: If they are of several kinds, of which only one would be read, or some that
            `datasets` finds would be left out.
    """
    if _has_card(path):
        return None
    found = _of_splits(path)
    data = _without_notices(found)
    first: dict[str, str] = {}
    for file in (file for files in data.values() for file in files):
        kind = _kind(file)
        if kind is not None:
            first.setdefault(kind, file.name)
    if len(first) > 1:
        named = ", ".join(f"{name} ({kind})" for kind, name in first.items())
        raise ValueError(
            f"{path} has data files of several kinds, {named}, of which only one would be read; "
            "leave one kind in the folder, or give a file"
        )
    if data == found:
        return None
    lost = [file for files in data.values() for file in files if file.suffix.lower() in UNNAMED]
    if lost:
        passed = {file for files in found.values() for file in files} - set().union(*data.values())
        raise ValueError(
            f"{path} has {lost[0].name}, which would not be read beside "
            f"{min(file.name for file in passed)}; take the latter out, or give a file"
        )
    kept = {split: [file for file in files if _kind(file)] for split, files in data.items()}
    return {split: [escape(str(file)) for file in files] for split, files in kept.items() if files}


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
