"""Calibrating a posterior whose predictive comes from samples of the linearised model.

Samples are linear in their deviation from the MAP, so one pass over the data gives the predictive
at every width and temperature. The prior stays as it is: its factor would do what the width does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.quadrature import averaged
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.validation.calibration import Calibration
from laplace_lora.tuning.validation.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation.calibration_search import PointPredictions, exponential, search

WIDTHS = (1.0, 0.7)  # of the priors: log scale, log temperature
AT_ONCE = 2**22  # numbers of the samples' logits that are in memory at once


@dataclass(frozen=True)
class SampledLabels:
    """What is labelled in a validation set.

    Attributes:
        mean: Functions of the outputs at the MAP, ``(rows, …, columns)``.
        tangents: Their change along each direction, ``(directions, rows, …, columns)``.
        y: Labels, ``(rows, …)``; those of a row are independent given the weights.
        groups: Which rows belong together, ``(rows,)``.
        readout: What the functions are.
    """

    mean: Tensor
    tangents: Tensor
    y: Tensor
    groups: Tensor
    readout: Readout

    def parts(self) -> Iterator[slice]:
        """Yield slices of the rows that fit into memory with all their samples."""
        size = max(1, AT_ONCE // (2 * len(self.tangents) * self.mean[0].numel()))
        for first in range(0, len(self.y), size):
            yield slice(first, first + size)


def unscaled(posterior: Posterior, generator: torch.Generator | None) -> LinearSamples:
    """Return samples of a posterior before calibration.

    Args:
        posterior: A fitted posterior.
        generator: Their source; a fixed seed by default.
    """
    bare = replace(posterior.settings, covariance_scale=1.0, likelihood_temperature=1.0)
    return LinearSamples(posterior.with_settings(bare), None, generator)


def calibrate_by_samples(
    posterior: Posterior, samples: LinearSamples, labelled: SampledLabels
) -> tuple[Settings, Calibration]:
    """Choose covariance scale and likelihood temperature by the NLL of labels, see `search`.

    Args:
        posterior: A fitted posterior; its present settings are the start.
        samples: What the tangents are of, see `unscaled`.
        labelled: The labels, and the functions that predict them.

    Returns:
        The settings, and what they changed.
    """
    settings = posterior.settings
    start = (math.log(settings.covariance_scale), math.log(settings.likelihood_temperature))

    def log_probabilities(point: Any, part: slice) -> Tensor:
        """Return log probabilities under each sample, ``(samples, rows, …, classes)``."""
        scale, temperature = (exponential(value) for value in point)
        slopes = labelled.tangents[:, part] * (math.sqrt(scale) / temperature)
        return samples.log_softmax(labelled.mean[part] / temperature, slopes, labelled.readout)

    def losses(point: Any) -> Tensor:
        found = []
        for part in labelled.parts():
            log_p = log_probabilities(point, part)
            index = labelled.y[part].unsqueeze(-1).expand(*log_p.shape[:-1], 1)
            of_labels = log_p.gather(-1, index).flatten(2).sum(-1)
            found.append(-averaged(of_labels))
        return torch.cat(found)

    def probabilities(point: Any) -> Tensor:
        parts = [averaged(log_probabilities(point, part)).exp() for part in labelled.parts()]
        return torch.cat(parts)

    def ece(point: Any) -> float:
        return expected_calibration_error(probabilities(point).flatten(0, -2), labelled.y.flatten())

    found = search(PointPredictions(losses, probabilities), start, WIDTHS, labelled.groups)
    scale, temperature = (exponential(value) for value in found.best)
    chosen = replace(settings, covariance_scale=scale, likelihood_temperature=temperature)
    report = Calibration(
        chosen.prior_precision.detach().clone(),
        scale,
        temperature,
        found.before,
        found.after,
        found.cross_fitted,
        ece(start),
        ece(found.best),
    )
    return chosen, report
