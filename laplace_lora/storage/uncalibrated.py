"""What a calibration takes back when it is undone, beside the settings that it chose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_lora.structures.settings import CALIBRATED, SCALES, Settings

UNCALIBRATED = "uncalibrated."
UNCALIBRATED_TENSORS = tuple(f"{UNCALIBRATED}{name}" for name in CALIBRATED if name not in SCALES)
UNCALIBRATED_SCALES = tuple(f"{UNCALIBRATED}{name}" for name in SCALES)


def uncalibrated_entries(settings: Settings) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return tensors and numbers by name; none where nothing was calibrated."""
    if settings.calibration is None:
        return {}, {}
    before = settings.uncalibrated()
    # What was set since is that of the settings, and a file holds no tensor twice.
    tensors = {n: _of(before, n).detach().clone() for n in UNCALIBRATED_TENSORS}
    return tensors, {n: _of(before, n) for n in UNCALIBRATED_SCALES}


def uncalibrated_from(tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> Settings | None:
    """Return what `uncalibrated_entries` said; ``None`` if nothing, as in earlier versions.

    Raises:
        ValueError: If a value is impossible.
        KeyError: If one is missing.
    """
    if not any(name.startswith(UNCALIBRATED) for name in (*tensors, *numbers)):
        return None
    found: dict[str, Any] = {name: tensors[name] for name in UNCALIBRATED_TENSORS}
    found |= {name: numbers[name] for name in UNCALIBRATED_SCALES}
    return Settings(**{name.removeprefix(UNCALIBRATED): value for name, value in found.items()})


def _of(settings: Settings, name: str) -> Any:
    return getattr(settings, name.removeprefix(UNCALIBRATED))
