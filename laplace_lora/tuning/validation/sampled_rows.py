"""Labelled rows and what samples predict for them after calibration, see `sample_calibration`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.quadrature import averaged, averaged_at
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.tuning.validation.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation.calibration_search import exponential

AT_ONCE = 2**22  # numbers of the samples' logits that are in memory at once


@dataclass(frozen=True)
class SampledRows:
    """Rows of a validation set, predicted at a point: the logarithms of scale and temperature.

    Attributes:
        samples: What the tangents are of, without scale and temperature.
        mean: Functions of the outputs at the MAP, ``(rows, …, columns)``.
        tangents: Their change along each direction, ``(directions, rows, …, columns)``.
        y: Labels, ``(rows, …)``; those of a row are independent given the weights.
        groups: Which rows belong together, ``(rows,)``.
        readout: What the functions are.
    """

    samples: LinearSamples
    mean: Tensor
    tangents: Tensor
    y: Tensor
    groups: Tensor
    readout: Readout

    def some(self, which: Tensor) -> SampledRows:
        """Return some of the rows, by their places."""
        return replace(
            self,
            mean=self.mean[which],
            tangents=self.tangents[:, which],
            y=self.y[which],
            groups=self.groups[which],
        )

    def losses(self, point: Any) -> Tensor:
        """Return the loss of each row in nats."""
        return torch.cat([-averaged_at(log_p, y) for log_p, y in self._parts(point)])

    def events(self, point: Any) -> Tensor:
        """Return class probabilities, ``(rows, …, classes)``."""
        return torch.cat([averaged(log_p).exp() for log_p, _ in self._parts(point)])

    def ece(self, point: Any) -> float:
        """Return the expected calibration error."""
        return expected_calibration_error(self.events(point).flatten(0, -2), self.y.flatten())

    def _parts(self, point: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield log probabilities under each sample, and labels, of as many rows as memory has."""
        scale, temperature = (exponential(value) for value in point)
        size = max(1, AT_ONCE // (2 * len(self.tangents) * self.mean[0].numel()))
        for first in range(0, len(self.y), size):
            part = slice(first, first + size)
            slopes = self.tangents[:, part] * (math.sqrt(scale) / temperature)
            mean = self.mean[part] / temperature
            yield self.samples.log_softmax(mean, slopes, self.readout), self.y[part]
