"""The two files of a saved posterior: written whole, read back and checked against their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TENSORS = "laplace.safetensors"
CONFIG = "laplace_config.json"
VERSION = 1


def read_files(directory: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of the tensors and the configuration, both checked against their hashes.

    Args:
        directory: Folder with the two files, or the name of a repository on the hub.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, altered or of an unknown version.
    """
    folder = Path(directory)
    if folder.is_dir():
        paths = {name: folder / name for name in (TENSORS, CONFIG)}
        for path in paths.values():
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing; was save_pretrained called there?")
    elif str(directory).count("/") == 1 and not folder.exists():
        from huggingface_hub import hf_hub_download

        paths = {name: Path(hf_hub_download(str(directory), name)) for name in (TENSORS, CONFIG)}
    else:
        raise FileNotFoundError(f"{directory} is neither a folder nor the name of a repository")
    payload = paths[TENSORS].read_bytes()
    try:
        config = json.loads(paths[CONFIG].read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is damaged: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("version"), int):
        raise ValueError(f"{CONFIG} is not the configuration of a posterior")
    if config["version"] != VERSION:
        raise ValueError(
            f"{CONFIG} has format version {config['version']}, this library reads {VERSION}; "
            "update it"
        )
    signature = config.pop("checksum", None)
    if signature != checksum(config):
        raise ValueError(f"{CONFIG} was altered or not completely written")
    if config["tensors"] != hashlib.sha256(payload).hexdigest():
        raise ValueError(f"{TENSORS} was altered, truncated or not completely written")
    return payload, config


def checksum(config: Mapping[str, Any]) -> str:
    """Return the hash of a configuration without its own checksum."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is either there as a whole or not at all.

    Args:
        path: The file; written under another name in its folder first.
        content: All of it.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
