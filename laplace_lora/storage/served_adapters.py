"""Samples of a posterior as PEFT adapters in a folder, with a manifest; all of it or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from laplace_lora.adapters.peft_files import CONFIG, WEIGHTS, save_adapter
from laplace_lora.adapters.selection import listed
from laplace_lora.models.changes.modes import set_weights

MANIFEST = "laplace_adapters.json"
VERSION = 1
NAMED = 3  # entries that an error names


def check_folder(folder: Path) -> None:
    """Refuse a folder with anything but an earlier export.

    Raises:
        FileExistsError: If there is something else; names the first entries.
    """
    is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if is_new:
        return
    if not (folder / MANIFEST).is_file():
        raise FileExistsError(
            f"{folder} is there and holds no exported adapters, which alone would be replaced; "
            "give a new folder"
        )
    others = _not_exported(folder)
    if others:
        raise FileExistsError(
            f"{folder} holds {listed(others, NAMED)} beside exported "
            "adapters, which alone would be replaced; move that, or give a new folder"
        )


def _not_exported(folder: Path) -> list[str]:
    """Return the entries of a folder that no export wrote, of its adapters' folders, too.

    Raises:
        FileExistsError: If the manifest does not say what was exported.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        names = [str(adapter["name"]) for adapter in manifest["adapters"]]
    except (ValueError, KeyError, TypeError):
        raise FileExistsError(
            f"{folder / MANIFEST} does not say which adapters were exported, which alone would be "
            "replaced; give a new folder"
        ) from None
    exported = {
        MANIFEST,
        *names,
        *(f"{name}/{file}" for name in names for file in (CONFIG, WEIGHTS)),
    }
    inside = [path for name in names for path in (folder / name).glob("*")]
    found = (path.relative_to(folder).as_posix() for path in [*folder.iterdir(), *inside])
    return sorted(set(found) - exported)


def write_adapters(
    folder: Path,
    model: nn.Module,
    own: Sequence[nn.Parameter],
    names: Sequence[str],
    weights: Tensor,
    description: Mapping[str, Any],
) -> list[Path]:
    """Write an adapter for each sample of the weights, and a manifest, and put them in place.

    Args:
        folder: Where they will be; an earlier export there is replaced.
        model: A `PeftModel` whose weights may be overwritten.
        own: Its tensors that were sampled.
        names: Their names, for errors.
        weights: Samples, ``(samples, parameters)``.
        description: What else the manifest says.

    Returns:
        The adapters' folders.

    Raises:
        FileExistsError: If the folder holds anything else.
        ValueError: If PEFT leaves one of the tensors out of an adapter; names it.
    """
    with _put_in_place(folder) as staged:
        adapters = []
        for number, sample in enumerate(weights):
            name = f"sample_{number}"
            set_weights(own, sample)
            save_adapter(model, staged / name)
            _check_written(staged / name / WEIGHTS, own, names)
            digest = hashlib.sha256((staged / name / WEIGHTS).read_bytes()).hexdigest()
            adapters.append({"name": name, "sha256": digest})
        manifest = {"version": VERSION, **description, "adapters": adapters}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return [folder / adapter["name"] for adapter in adapters]


def _check_written(file: Path, own: Sequence[nn.Parameter], names: Sequence[str]) -> None:
    """Refuse an adapter that lacks a tensor that was sampled."""
    written = list(load_file(file).values())
    for name, parameter in zip(names, own, strict=True):
        value = parameter.detach().cpu()
        same = (t for t in written if t.shape == value.shape and t.dtype == value.dtype)
        if not any(torch.equal(tensor, value) for tensor in same):
            raise ValueError(
                f"PEFT does not write {name!r} with the adapter, so its samples cannot be served; "
                "leave it out of the posterior with `modules`, or list its module in "
                "`modules_to_save` of the adapter's configuration"
            )


@contextmanager
def _put_in_place(folder: Path) -> Iterator[Path]:
    """Yield a folder that takes another one's place when the block ends, and is gone if it fails.

    Raises:
        FileExistsError: See `check_folder`.
    """
    folder = Path(os.path.abspath(folder))
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as place:
        staged = Path(place) / "new"
        staged.mkdir()
        yield staged
        check_folder(folder)
        if folder.exists():
            os.replace(folder, Path(place) / "old")
        try:
            os.replace(staged, folder)
        except OSError:
            if (Path(place) / "old").exists():
                shutil.move(Path(place) / "old", folder)
            raise
