"""The two files of a saved posterior: written whole, read back and checked against their hashes.

``laplace.safetensors`` holds the tensors and, in its header, the configuration: it is a whole
posterior by itself, and one rename puts it in place. ``laplace_config.json`` repeats the
configuration for people and for earlier versions. A reader that finds the two apart, because a
writer is at work or was killed between them, takes the first.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from laplace_lora.storage.whole_files import sweep, write_whole

TENSORS = "laplace.safetensors"
CONFIG = "laplace_config.json"
VERSION = 1
RECENTRED = 2  # readers of version 1 would leave the shift out
COMPACT = 3  # rounded to half precision, with a shift or without
VERSIONS = (VERSION, RECENTRED, COMPACT)
KEY = "laplace_config"  # of the configuration in the header of the tensors
NEEDED = (
    "class",
    "arguments",
    "backend",
    "output",
    "scalars",
    "curvature",
    "parameters",
    "weights",
    "adapter",
    "base",
)


def write_files(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write tensors and configuration into a folder; the first file is a whole by itself.

    Files that a process left half-written when it was killed are removed.

    Args:
        folder: The folder; made if missing.
        tensors: Contiguous tensors on the CPU.
        config: Everything else, without hashes.
    """
    plain = save(dict(tensors))
    content = {**config, "content": _content_hash(plain)}
    text = json.dumps({**content, "checksum": checksum(content)})
    head = json.dumps({**_header(plain), "__metadata__": {KEY: text}}).encode()
    head += b" " * (-len(head) % 8)
    payload: list[bytes | memoryview] = [len(head).to_bytes(8, "little") + head, _data(plain)]
    digest = hashlib.sha256()
    for part in payload:
        digest.update(part)
    beside = {**content, "tensors": digest.hexdigest()}
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, (TENSORS, CONFIG))
    write_whole(folder / TENSORS, *payload)
    text = json.dumps({**beside, "checksum": checksum(beside)}, indent=1)
    write_whole(folder / CONFIG, text.encode())


def read_files(directory: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of the tensors and the configuration, both checked against their hashes.

    Args:
        directory: Folder with the files, or the name of a repository on the hub, ``user/name``,
            or of a folder in one, ``user/name/folder``.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, altered or of an unknown version.
    """
    paths = _paths(directory)
    payload = paths[TENSORS].read_bytes()
    within = _config_within(payload)
    if paths[CONFIG].is_file():
        config = _checked(_parsed(paths[CONFIG].read_bytes()))
        if config.get("tensors") == hashlib.sha256(payload).hexdigest():
            return payload, config
    elif within is None:
        raise FileNotFoundError(f"{paths[CONFIG]} is missing; was save_pretrained called there?")
    if within is None:
        raise ValueError(f"{TENSORS} was altered, truncated or not completely written")
    return payload, within


def checksum(content: Mapping[str, Any]) -> str:
    """Return the hash of values that JSON can hold, such as a configuration without its own."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _paths(directory: str | os.PathLike[str]) -> dict[str, Path]:
    folder = Path(directory)
    if folder.is_dir():
        paths = {name: folder / name for name in (TENSORS, CONFIG)}
        if not paths[TENSORS].is_file():
            raise FileNotFoundError(
                f"{paths[TENSORS]} is missing; was save_pretrained called there?"
            )
        return paths
    name = str(directory)
    if name.count("/") in (1, 2) and not name.startswith((".", "~", "/")) and not folder.exists():
        owner, repository, *inside = name.split("/")
        return _from_hub(f"{owner}/{repository}", inside)
    raise FileNotFoundError(f"{directory} is neither a folder nor the name of a repository")


def _from_hub(repository: str, inside: Sequence[str]) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    name = "/".join([repository, *inside])
    try:
        path = Path(hf_hub_download(repository, "/".join([*inside, TENSORS])))
        with suppress(EntryNotFoundError):  # the first file is a whole by itself
            hf_hub_download(repository, "/".join([*inside, CONFIG]))  # into the same folder
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor the name of a repository"
        ) from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and the hub, which may have a repository of that name, "
            "was not reached"
        ) from error
    except EntryNotFoundError as error:
        raise FileNotFoundError(
            f"the hub's repository {repository} has no {'/'.join([*inside, TENSORS])}; was "
            "push_to_hub called? What lies in a folder is read as 'user/repository/folder'"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and no repository of that name on the hub that you may "
            "read; check the name, and log in with `hf auth login` if it is private"
        ) from error
    return {TENSORS: path, CONFIG: path.parent / CONFIG}


def _parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is damaged: {error}") from None


def _checked(config: Any) -> dict[str, Any]:
    """Return a configuration without its checksum, which is right."""
    if not isinstance(config, dict) or not isinstance(config.get("version"), int):
        raise ValueError(f"{CONFIG} is not the configuration of a posterior")
    if config["version"] not in VERSIONS:
        raise ValueError(
            f"{CONFIG} has format version {config['version']}, this library reads {VERSIONS}; "
            "update it"
        )
    signature = config.pop("checksum", None)
    if signature != checksum(config):
        raise ValueError(f"{CONFIG} was altered or not completely written")
    missing = [key for key in NEEDED if key not in config]
    if missing:
        raise ValueError(f"{CONFIG} lacks {missing}")
    return config


def _config_within(payload: bytes) -> dict[str, Any] | None:
    """Return the configuration in the header of the tensors, ``None`` unless both are whole."""
    try:
        config = _checked(json.loads(_header(payload)["__metadata__"][KEY]))
        return config if config.get("content") == _content_hash(payload) else None
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return None


def _header(payload: bytes) -> Any:
    """Return the table of tensors at the beginning of a safetensors file."""
    return json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])


def _data(payload: bytes) -> memoryview:
    """Return the values of the tensors, without copying them."""
    return memoryview(payload)[8 + int.from_bytes(payload[:8], "little") :]


def _content_hash(payload: bytes) -> str:
    """Return the hash of tensors, their names and shapes, without the rest of the header."""
    header = {name: value for name, value in _header(payload).items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(_data(payload))
    return digest.hexdigest()
