"""Calibrating a posterior whose predictive comes from samples of the linearised model.

Samples are linear in their deviation from the MAP, so one pass over the data gives the predictive
at every width and temperature. The prior stays as it is: its factor would do what the width does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import CONTRASTS, Readout
from laplace_lora.likelihoods.label_check import check_labels
from laplace_lora.likelihoods.quadrature import averaged
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.validation.cache import labelled_batches, validation_rows
from laplace_lora.tuning.validation.calibration import Calibration
from laplace_lora.tuning.validation.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation.calibration_search import (
    PointPredictions,
    exponential,
    of_all_rows,
    search,
    some_rows,
)

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

    def some(self, which: Tensor) -> SampledLabels:
        """Return some of the rows, by their places."""
        found = self.mean[which], self.tangents[:, which], self.y[which], self.groups[which]
        return SampledLabels(*found, self.readout)

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


def calibrate_classes(
    posterior: Posterior,
    loader: Any,
    team: Together,
    generator: torch.Generator | None,
    progress_bar: bool | None,
) -> tuple[Settings, Calibration]:
    """Calibrate a classifier of many classes for the samples that it predicts with.

    Memory and time grow with rows times classes, those of exact moments with their square and cube.

    Args:
        posterior: A fitted posterior; its present settings are the start.
        loader: Validation batches with labels.
        team: The processes that share the loader.
        generator: Source of the samples; a fixed seed by default.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        As `calibrate_by_samples`.

    Raises:
        ValueError: If there is no loader, it is empty, or see `check_labels`.
        NoForwardDerivativeError: If the model cannot carry tangents.
    """
    samples = unscaled(posterior, generator)
    means, slopes, labels = [], [], []
    for x, y in labelled_batches(posterior, loader, team, progress_bar):
        mean, tangents = samples.tangents(x, CONTRASTS)
        check_labels(posterior.objective, mean, y, CONTRASTS)
        means.append(mean)
        slopes.append(tangents.transpose(0, 1))
        labels.append(y)
    rows = validation_rows(team, mean=means, tangents=slopes, y=labels)
    apart = torch.arange(len(rows["y"]), device=rows["y"].device)
    tangents = rows["tangents"].transpose(0, 1)
    labelled = SampledLabels(rows["mean"], tangents, rows["y"], apart, CONTRASTS)
    return calibrate_by_samples(posterior, samples, labelled)


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

    def log_probabilities(rows: SampledLabels, point: Any, part: slice) -> Tensor:
        """Return log probabilities under each sample, ``(samples, rows, …, classes)``."""
        scale, temperature = (exponential(value) for value in point)
        slopes = rows.tangents[:, part] * (math.sqrt(scale) / temperature)
        return samples.log_softmax(rows.mean[part] / temperature, slopes, rows.readout)

    def losses(rows: SampledLabels, point: Any) -> Tensor:
        found = []
        for part in rows.parts():
            log_p = log_probabilities(rows, point, part)
            index = rows.y[part].unsqueeze(-1).expand(*log_p.shape[:-1], 1)
            of_labels = log_p.gather(-1, index).flatten(2).sum(-1)
            found.append(-averaged(of_labels))
        return torch.cat(found)

    def probabilities(rows: SampledLabels, point: Any) -> Tensor:
        parts = [averaged(log_probabilities(rows, point, part)).exp() for part in rows.parts()]
        return torch.cat(parts)

    def ece(point: Any) -> float:
        p = probabilities(labelled, point)
        return expected_calibration_error(p.flatten(0, -2), labelled.y.flatten())

    are_apart = len(labelled.groups.unique()) == len(labelled.groups)
    which = some_rows(labelled.y) if are_apart else None
    part = labelled if which is None else labelled.some(which)
    predictions = PointPredictions(partial(losses, part), partial(probabilities, part))
    found = search(predictions, start, WIDTHS, part.groups)
    if which is not None:
        found = of_all_rows(found, start, partial(losses, labelled))
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
