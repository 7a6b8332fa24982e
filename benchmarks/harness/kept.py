"""Figures that are computed once, and kept in files with the settings that they were computed with.

Files appear whole or not at all. One that was computed with other settings is refused.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS = "settings"  # beside a file's figures


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the path to write a file to, which takes its own name when it is whole.

    Args:
        path: Of the file; its folder is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Of a name of its own: several processes may compute the same figures.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write(path: Path, content: Any) -> None:
    """Write JSON."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1))


def read(path: Path) -> Any:
    """Read JSON.

    Raises:
        SystemExit: If it is none.
    """
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise SystemExit(f"{path} is damaged ({error}); delete it to compute it again") from error


def check(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuse what was computed with other settings.

    Says so where a file of an earlier version does not have a setting.

    Args:
        path: Of the file.
        stored: The settings in it.
        settings: Those that are wanted; must be JSON.

    Raises:
        SystemExit: If one of them is not what is stored.
    """
    unknown = [name for name in settings if name not in stored]
    if unknown:
        print(f"{path} does not say its {', '.join(unknown)}: could not be checked", flush=True)
    for name, value in settings.items():
        if name in stored and stored[name] != value:
            raise SystemExit(
                f"{path} was computed with {name} {stored[name]}, not {value}; other settings need "
                "another --out"
            )


def figures_of(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a file that were computed with some settings.

    Args:
        path: Of the file.
        settings: See `check`.

    Raises:
        SystemExit: See `check` and `read`.
    """
    figures: dict[str, Any] = read(path)
    check(path, figures.pop(SETTINGS, {}), settings)
    return figures


def keep(path: Path, settings: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Keep figures with their settings."""
    write(path, {SETTINGS: dict(settings), **figures})


def kept(
    path: Path, settings: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a file's figures, computed if there is no file.

    Args:
        path: Of the file.
        settings: See `check`.
        compute: Returns the figures.

    Raises:
        SystemExit: See `check` and `read`.
    """
    if not path.exists():
        keep(path, settings, compute())
    return figures_of(path, settings)
