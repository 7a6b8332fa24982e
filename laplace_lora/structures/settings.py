"""`Settings`: what may be tuned after a fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from laplace_lora.linalg.finite import all_finite
from laplace_lora.linalg.row_storage import by_tensor, by_weight

TENSORS = ("prior_precision", "prior_mean", "sigma_noise")
SCALES = ("covariance_scale", "likelihood_temperature")
CALIBRATED = ("prior_precision", "sigma_noise", *SCALES)  # what a calibration chooses together


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor; what it was derived from gets gradients through the copy, too."""
    if tensor.is_leaf:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return tensor.clone()


def check_positive(name: str, value: Tensor | float) -> None:
    """Refuse a setting that is not positive and finite.

    Raises:
        ValueError: If some entry is not, or is no number; names the setting.
    """
    if not isinstance(value, Tensor | int | float):
        raise ValueError(f"{name} must be a positive number, got {value!r}")
    values = torch.as_tensor(value).detach()
    bad = ~((values > 0) & values.isfinite())
    if values.device.type != "meta" and bool(bad.any()):
        raise ValueError(f"{name} must be positive and finite, got {values[bad].tolist()}")


def check_count(name: str, value: object) -> None:
    """Refuse what is no number of things.

    Raises:
        ValueError: If it is no whole number, or below 1; names it.
    """
    if not isinstance(value, SupportsIndex) or value.__index__() < 1:
        raise ValueError(f"{name} must be a whole number, at least 1; got {value!r}")


@dataclass(frozen=True)
class Settings:
    """What may be tuned after a fit.

    Attributes:
        prior_precision: One value, one per tensor or one per weight.
        prior_mean: One value, or one per weight.
        sigma_noise: Standard deviation of a regression's noise, a scalar; 1 for other likelihoods.
        covariance_scale: Factor of the predictive covariance, 1 unless tuned or calibrated.
        likelihood_temperature: Divides logits before the softmax, 1 unless calibrated.
        shift: How far the posterior's mean lies from the weights at which the model is linearised,
            ``(parameters,)``; ``None`` for not at all, see `tuning.left_out.recentring`.
        calibration: What `CALIBRATED` were before a calibration, and what it chose; ``None``
            without one.
    """

    prior_precision: Tensor = field(default_factory=lambda: torch.ones(1))
    prior_mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    sigma_noise: Tensor = field(default_factory=lambda: torch.ones(()))
    covariance_scale: float = 1.0
    likelihood_temperature: float = 1.0
    shift: Tensor | None = None
    calibration: tuple[Settings, Settings] | None = None

    def __post_init__(self) -> None:
        """Refuse what gives plausible numbers all the same.

        Raises:
            ValueError: If a precision, noise, scale or temperature is not positive and finite, or
                the prior mean not finite.
        """
        for name in ("prior_precision", "sigma_noise", *SCALES):
            check_positive(name, getattr(self, name))
        if self.prior_mean.device.type != "meta" and not all_finite(self.prior_mean):
            raise ValueError("prior_mean must be finite, and has entries that are infinite or NaN")

    @property
    def versions(self) -> list[int]:
        """How often each tensor has been changed in place, as by ``prior_precision.mul_(2)``."""
        tensors = [getattr(self, name) for name in TENSORS]
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]

    def own(self) -> Settings:
        """Return the settings in tensors that no other posterior changes in place."""
        copies: Any = {name: copied(getattr(self, name)) for name in TENSORS}
        return replace(self, **copies)

    def with_value(self, name: str, value: Any) -> Settings:
        """Return the settings with one of them set, which no undone calibration takes back.

        A tensor is copied, as its owner may change it in place; gradients flow through.
        """
        value = value.clone() if isinstance(value, Tensor) else value
        calibration = self.calibration
        if calibration is not None and name in CALIBRATED:
            calibration = (replace(calibration[0], **{name: value}), calibration[1])
        given: Any = {name: value, "calibration": calibration}
        return replace(self, **given)

    def calibrated_from(self, earlier: Settings) -> Settings:
        """Return the settings that a calibration chose, which `uncalibrated` takes back.

        Args:
            earlier: Those that the calibration started from.
        """
        return replace(self, calibration=(_chosen(earlier.uncalibrated()), _chosen(self)))

    def uncalibrated(self) -> Settings:
        """Return the settings before calibration, but for what was set since."""
        if self.calibration is None:
            return self
        before, after = self.calibration
        back = {
            name: _apart(getattr(before, name))
            for name in CALIBRATED
            if _are_equal(getattr(self, name), getattr(after, name))
        }
        return replace(self, calibration=None, **back)

    def of_new_data(self) -> Settings:
        """Return the settings that a fit leaves: neither calibrated nor with a moved mean.

        The prior stays, and with it the width that may have been tuned together with it.
        """
        return replace(self.uncalibrated(), shift=None)

    def untuned(self) -> Settings:
        """Return the settings that a tuning starts from: those of new data, unscaled."""
        return replace(self.of_new_data(), covariance_scale=1.0, likelihood_temperature=1.0)

    def calibrated(self, mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
        """Return moments of outputs with the width and temperature that a calibration chose."""
        temperature = self.likelihood_temperature
        return mean / temperature, covariance * (self.covariance_scale / temperature**2)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Settings:
        """Return the settings on another device, prior and noise perhaps in another dtype."""
        moved = {name: getattr(self, name).to(device, dtype) for name in TENSORS}
        shift = None if self.shift is None else self.shift.to(device)
        calibration = None
        if self.calibration is not None:
            before, after = self.calibration
            calibration = before.to(device, dtype), after.to(device, dtype)
        return replace(self, **moved, shift=shift, calibration=calibration)


def _chosen(settings: Settings) -> Settings:
    """Return what a calibration chooses, in tensors of its own."""
    return Settings(**{name: _apart(getattr(settings, name)) for name in CALIBRATED})


def _apart(value: Any) -> Any:
    """Return a number, or a copy of a tensor, which others may change in place."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def _are_equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def expanded(values: Tensor, sizes: tuple[int, ...] | list[int]) -> Tensor:
    """Return one value per weight from one in all, one per tensor or one per weight.

    Args:
        values: ``(1,)``, ``(tensors,)`` or ``(parameters,)``.
        sizes: Numbers in each tensor.

    Raises:
        ValueError: If there are as many values as neither.
    """
    return by_weight(by_tensor(values, sizes), sizes)
