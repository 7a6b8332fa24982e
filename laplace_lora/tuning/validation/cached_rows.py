"""Labelled rows and what any calibrated values predict for them, see `calibration`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Scoring
from laplace_lora.likelihoods.multilabel import pooled
from laplace_lora.tuning.validation.cache import ValidationCache
from laplace_lora.tuning.validation.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation.calibration_search import exponential

Self = TypeVar("Self", bound="Cached")


@dataclass(frozen=True)
class Cached:
    """Rows of a cached pass, predicted at a point: of all the values that are calibrated.

    Attributes:
        cache: Their moments under any prior.
        centre: Their mean where the posterior has not been moved, ``(rows, columns)``.
    """

    cache: ValidationCache
    centre: Tensor

    @property
    def groups(self) -> Tensor:
        """Which rows belong together: each stands for itself."""
        return torch.arange(len(self.centre), device=self.centre.device)

    def some(self: Self, which: Tensor) -> Self:
        """Return some of the rows, by their places."""
        return replace(self, cache=self.cache.some(which), centre=self.centre[which])

    def mean(self, point: Any) -> Tensor:
        """Return means under a multiple of the posterior's shift, a point's fourth value if any."""
        moved = self.cache.mean
        return self.centre + point[3] * (moved - self.centre) if len(point) > 3 else moved


@dataclass(frozen=True)
class CachedRows(Cached):
    """Rows whose labels are scored after a temperature.

    The values are the logarithms of a factor of the prior precision, of a scale of the covariance
    and of a temperature, and of a recentred posterior a multiple of its shift.

    Attributes:
        scoring: How predictions are scored.
    """

    scoring: Scoring

    def losses(self, point: Any) -> Tensor:
        """Return the loss of each row in nats."""
        return self.scoring.nll(*self._moments(point), self.cache.y)

    def events(self, point: Any) -> Tensor:
        """Return probabilities of events that exclude each other, ``(rows, …, events)``."""
        p = self._probabilities(point)  # of labels that do not exclude each other, or of classes
        return p if self.cache.y.ndim == 1 else torch.stack([1 - p, p], dim=-1)

    def ece(self, point: Any) -> float:
        """Return the expected calibration error."""
        return expected_calibration_error(*pooled(self._probabilities(point), self.cache.y))

    def _moments(self, point: Any) -> tuple[Tensor, Tensor]:
        factor, scale, temperature = (exponential(value) for value in point[:3])
        mean = self.mean(point)
        covariance = self.cache.covariance(mean.new_tensor([factor]))
        return mean / temperature, covariance * (scale / temperature**2)

    def _probabilities(self, point: Any) -> Tensor:
        mean, covariance = self._moments(point)
        ((p,),) = self.scoring.metric_arguments(mean, covariance.unsqueeze(0))
        return p
