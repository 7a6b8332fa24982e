"""Rows of data set folders."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

KINDS = {  # of data files that `datasets` reads, which takes one kind of a folder
    ".csv": "CSV",
    ".tsv": "TSV",
    ".json": "JSON",
    ".jsonl": "JSON",
    ".ndjson": "JSON",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
    ".txt": "text",
}
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
CARD = "README.md"


def rows_of_folder(path: Path, split: str | None) -> list[dict[str, Any]]:
    """Return the rows of a data set folder.

    Args:
        path: What ``save_to_disk`` wrote, or files as on the hub.
        split: Its name, where there are several.

    Raises:
        ImportError: If ``datasets`` is not installed.
        ValueError: If there is no such split, none of several is named, or some files would not be
            read.
    """
    datasets = _datasets(path)
    written = _is_written(path)
    if not written:
        _check_one_kind(path)
    with _quietly(datasets):
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


def files_of_folder(path: Path) -> list[Path]:
    """Return the files that may hold a folder's data.

    Args:
        path: The folder.

    Raises:
        ImportError: If ``datasets`` is not installed.
    """
    if _is_written(path) or _has_card(path):
        return [file for file in path.rglob("*") if file.is_file()]
    _datasets(path)
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        of_splits = DataFilesDict.from_patterns(get_data_patterns(str(path)), str(path))
    except FileNotFoundError:  # `datasets` says later what is missing
        return []
    return [Path(str(name)) for files in of_splits.values() for name in files]


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
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _has_card(path: Path) -> bool:
    """Return whether a folder says itself which files are its data."""
    card = path / CARD
    return card.is_file() and "data_files" in card.read_text(encoding="utf-8", errors="replace")


def _check_one_kind(path: Path) -> None:
    """Refuse a folder whose data files are of several kinds: only one would be read."""
    if _has_card(path):
        return
    first: dict[str, str] = {}
    for file in files_of_folder(path):
        suffix = Path(file.stem).suffix if file.suffix.lower() in PACKED else file.suffix
        kind = KINDS.get(suffix.lower())
        if kind is not None:
            first.setdefault(kind, file.name)
    if len(first) > 1:
        named = ", ".join(f"{name} ({kind})" for kind, name in first.items())
        raise ValueError(
            f"{path} has data files of several kinds, {named}, of which only one would be read; "
            "leave one kind in the folder, or give a file"
        )


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
