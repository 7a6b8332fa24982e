"""Say which file or weight of an adapter or its base model is missing or damaged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

FILES = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT calls them
AGAIN = "copy or download it again"


@contextmanager
def adapter_weights_found(adapter: str) -> Iterator[None]:
    """Say of an adapter's weights that cannot be loaded which file is missing or damaged.

    Raises:
        FileNotFoundError: If the folder has none.
        ValueError: If the folder's file is damaged.
    """
    folder = Path(adapter)
    here = [folder / name for name in FILES if (folder / name).is_file()]
    if folder.is_dir() and not here:
        raise FileNotFoundError(
            f"{adapter} has no weights: neither {' nor '.join(FILES)}, one of which PEFT's "
            "save_pretrained writes beside adapter_config.json; save or copy the adapter again"
        )
    try:
        yield
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        if not here:
            raise
        raise ValueError(f"{here[0]} is damaged ({_line(error)}); {AGAIN}") from error


@contextmanager
def base_model_found(source: str, named_by: str) -> Iterator[None]:
    """Say of a base model that cannot be loaded who names it, and what to do.

    Raises:
        FileNotFoundError: If there is no such folder, nor such a repository.
        ValueError: If a file of its weights is damaged.
    """
    folder = Path(source)
    try:
        yield
    except SafetensorError as error:
        files = sorted(folder.glob("*.safetensors"))
        name = next((str(path) for path in files if not _is_whole(path)), f"a file of {source}")
        raise ValueError(f"{name} is damaged ({_line(error)}); {AGAIN}") from error
    except (OSError, HFValidationError) as error:
        if folder.is_dir():
            raise
        is_path = folder.is_absolute() or source.startswith(".") or source.count("/") > 1
        hub = "" if is_path else f", and it is not read from the hub either ({_line(error)})"
        raise FileNotFoundError(
            f"the base model {source}, as {named_by} names it, was not found: there is no such "
            f"folder{'' if folder.is_absolute() else ' here'}{hub}. Give it by --base"
        ) from error


def check_no_random_weights(
    report: Mapping[str, Any], saved: Mapping[str, Tensor], adapter: str, base: str
) -> None:
    """Refuse a base model some of whose weights are neither in its file nor in the adapter's."""
    fresh = [*report.get("missing_keys", ()), *(k[0] for k in report.get("mismatched_keys", ()))]
    known = {name.removeprefix("base_model.model.") for name in saved}
    random = sorted(str(name) for name in fresh if name not in known)
    if random:
        some = ", ".join(random[:4]) + (", ..." if len(random) > 4 else "")
        raise ValueError(
            f"{some} are neither in {base} nor "
            f"in {adapter}, and would be random; save the adapter with modules_to_save, or give "
            "the base model that it was trained on by --base"
        )


def _is_whole(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except SafetensorError:
        return False


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
