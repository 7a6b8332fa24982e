"""Labelled rows and what any calibrated values predict for them, see `calibration`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Scoring
from laplace_lora.likelihoods.multilabel import pooled
from laplace_lora.tuning.validation.cache import ValidationCache
from laplace_lora.tuning.validation.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation.calibration_search import exponential


@dataclass(frozen=True)
class CachedRows:
    """Rows of a cached pass, predicted at a point: of all the values that are calibrated.

    These are the logarithms of a factor of the prior precision, of a scale of the covariance and of
    a temperature, and of a recentred posterior a multiple of its shift.

    Attributes:
        cache: Their moments under any prior.
        centre: Their mean where the posterior has not been moved, ``(rows, columns)``.
        scoring: How predictions are scored.
    """

    cache: ValidationCache
    centre: Tensor
    scoring: Scoring

    def some(self, count: int) -> CachedRows:
        """Return random rows, the same at every call; all of them if there are no more."""
        which = random_rows(self.cache.y, count)
        if which is None:
            return self
        return CachedRows(self.cache.some(which), self.centre[which], self.scoring)

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
        mean = stepped(self.cache.mean, self.centre, point)
        covariance = self.cache.covariance(mean.new_tensor([factor]))
        return mean / temperature, covariance * (scale / temperature**2)

    def _probabilities(self, point: Any) -> Tensor:
        mean, covariance = self._moments(point)
        ((p,),) = self.scoring.metric_arguments(mean, covariance.unsqueeze(0))
        return p


def random_rows(y: Tensor, count: int) -> Tensor | None:
    """Return the places of random rows, the same at every call; ``None`` if there are no more."""
    if len(y) <= count:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(y), generator=generator)[:count].sort().values.to(y.device)


def stepped(mean: Tensor, centre: Tensor, point: Any) -> Tensor:
    """Return means under a point's multiple of the posterior's shift, if it has one.

    Args:
        mean: Under the present shift.
        centre: Without it.
        point: All the values that are calibrated; the multiple is the fourth.
    """
    return centre + point[3] * (mean - centre) if len(point) > 3 else mean
