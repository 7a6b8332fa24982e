"""Files of a folder, or of a repository on the hub."""

from __future__ import annotations

from pathlib import Path


def file_of(source: str, name: str) -> Path | None:
    """Return where a file is, ``None`` if there is none.

    Args:
        source: A folder, or the name of a repository, from which the file is downloaded.
        name: Of the file.

    Raises:
        FileNotFoundError: If the hub, which may have the file, is not reached.
    """
    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, name))
    except LocalEntryNotFoundError:
        if try_to_load_from_cache(source, name) is _CACHED_NO_EXIST:
            return None
        raise FileNotFoundError(
            f"the hub was not reached, and the repository {source} may have a {name}, which says "
            "how its data are read; download the repository and give the folder"
        ) from None
    except EntryNotFoundError:
        return None
