"""Files that are there as a whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows, where an open file cannot be deleted anyway
    fcntl = None  # type: ignore[assignment]

LITTER = ".tmp"
NEW = 60  # seconds between making a file and locking it are far fewer


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when the block ends without an error.

    Until then it has another name in the same folder. Others may read it as they may read any file
    that is made there; what `tempfile` makes is its owner's alone, whatever the folder's.
    """
    name = f"{path}.{secrets.token_hex(8)}{LITTER}"
    flags = os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0)
    handle = os.open(name, flags, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            if fcntl is not None:  # so that nobody takes it for litter
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if fcntl is not None:
                os.replace(name, path)  # while it is locked
        if fcntl is None:
            os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file, see `whole_file`."""
    with whole_file(path) as file:
        for part in parts:
            file.write(part)


def sweep(folder: Path, names: Sequence[str]) -> None:
    """Remove half-written files whose process is gone: nobody holds their lock any more.

    New ones stay, as another process may be about to lock them.

    Args:
        folder: The folder.
        names: What the files were to be called.
    """
    for name in names if fcntl is not None else ():
        for path in folder.glob(f"{name}*{LITTER}"):
            with suppress(OSError), path.open("rb") as file:
                if time.time() - path.stat().st_mtime > NEW:
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
