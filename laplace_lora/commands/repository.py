"""Files of a folder, or of a repository on the hub."""

from __future__ import annotations

from pathlib import Path


def file_of(source: str, name: str) -> Path | None:
    """Return where a file is, ``None`` if there is none.

    Args:
        source: A folder, or the name of a repository, from which the file is downloaded.
        name: Of the file.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except EntryNotFoundError:
        return None
