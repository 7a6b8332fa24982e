"""Labelled rows or targets, and what any calibrated values predict for them, see `calibration`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributions import Normal

from laplace_lora.likelihoods.base import Scoring
from laplace_lora.likelihoods.multilabel import pooled
from laplace_lora.likelihoods.regression import GaussianScoring
from laplace_lora.tuning.validation.cache import ValidationCache
from laplace_lora.tuning.validation.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation.calibration_search import exponential

INTERVALS = 16  # of an output, equally likely before calibration
LEVELS = 15  # of quantiles whose calibration is looked at

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


@dataclass(frozen=True)
class CachedTargets(Cached):
    """Rows with targets of a regression.

    The values are the logarithms of a factor of the prior precision, of a scale of the covariance
    and of a factor of the observation noise, and of a recentred posterior a multiple of its shift.

    Attributes:
        noise: Standard deviation of the present noise.
        start: The present point.
    """

    noise: float
    start: tuple[float, ...]

    def losses(self, point: Any) -> Tensor:
        """Return the loss of each row in nats."""
        mean, covariance, noise = self._moments(point)
        return GaussianScoring(noise).nll(mean, covariance, self.cache.y)

    def events(self, point: Any) -> Tensor:
        """Return the probabilities of intervals of each output, ``(rows, outputs, INTERVALS)``.

        They are equally probable at the start.
        """
        below = self._marginals(point).cdf(self._edges).movedim(0, -1)
        ends = below.new_zeros(*below.shape[:-1], 1)
        return torch.cat([ends, below, ends + 1], -1).diff()

    def ece(self, point: Any) -> float:
        """Return how far shares of targets below predicted quantiles are from the levels, in mean.

        Source: Kuleshov, Fenner and Ermon (2018), arXiv:1807.00263, section 3.5; absolute
        differences at 15 levels in place of squares.
        """
        reached = self._marginals(point).cdf(self.cache.y.double()).flatten()
        levels = torch.arange(1, LEVELS + 1, device=reached.device) / (LEVELS + 1)
        shares = (reached <= levels.unsqueeze(1)).double().mean(1)
        return float((shares - levels).abs().mean())

    @cached_property
    def _edges(self) -> Tensor:
        """Between the intervals, ``(INTERVALS - 1, rows, outputs)``."""
        levels = torch.arange(1, INTERVALS, dtype=torch.float64) / INTERVALS
        present = self._marginals(self.start)
        return present.icdf(levels.to(present.mean.device).view(-1, 1, 1))

    def _marginals(self, point: Any) -> Normal:
        mean, covariance, noise = self._moments(point)
        variance = covariance.diagonal(dim1=-2, dim2=-1).double() + noise**2
        return Normal(mean.double(), variance.sqrt())

    def _moments(self, point: Any) -> tuple[Tensor, Tensor, float]:
        factor, scale, noise = (exponential(value) for value in point[:3])
        mean = self.mean(point)
        # The curvature has the noise's variance below it: with a noise that is s times as large, a
        # prior precision as before has the covariance of one s² as large under the noise before.
        covariance = self.cache.covariance(mean.new_tensor([factor * noise**2]))
        return mean, covariance * (scale * noise**2), self.noise * noise
