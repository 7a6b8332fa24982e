"""Metrics of independent labels, as functions of ``(examples, labels)`` probabilities and labels.

Labels are 0, 1, or missing (−100 or NaN), and a missing one enters nothing. What is a metric of
class probabilities is that of all known labels pooled, each a binary classification of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision

from laplace_lora.evaluation.metrics import METRICS
from laplace_lora.likelihoods.information import entropy
from laplace_lora.likelihoods.multilabel import MISSING, known_labels, pooled
from laplace_lora.tuning.validation.calibration_error import binary_expected_calibration_error

Metric = Callable[[Tensor, Tensor], float]


def average_precisions(p: Tensor, y: Tensor) -> Tensor:
    """Return the average precision of each label, ``(labels,)``; NaN where it never applies."""
    return _by_label(_average_precision, p, y)


def mean_average_precision(p: Tensor, y: Tensor) -> float:
    """Return the mean over labels of the average precision, over those that apply somewhere."""
    return float(average_precisions(p, y).nanmean())


def calibration_errors(p: Tensor, y: Tensor) -> Tensor:
    """Return the calibration error of each label's probability, ``(labels,)``; NaN without labels.

    Over 15 equal-width bins of the probability that the label applies, a fraction.
    """
    return _by_label(_calibration_error, p, y)


def label_ece(p: Tensor, y: Tensor) -> float:
    """Return the mean over labels of `calibration_errors`.

    Unlike the ECE of the pooled labels it sees labels that are over- and underconfident by as
    much.
    """
    return float(calibration_errors(p, y).nanmean())


def label_entropy(p: Tensor) -> Tensor:
    """Return the entropies of an example's labels in nats, summed, ``(examples,)``, in float64."""
    p = p.double()
    return entropy(torch.stack([1 - p, p], dim=-1)).sum(-1)


def _by_label(metric: Metric, p: Tensor, y: Tensor) -> Tensor:
    y = known_labels(y)
    values = []
    for own, truth in zip(p.unbind(1), y.unbind(1), strict=True):
        is_known = truth != MISSING
        values.append(metric(own[is_known], truth[is_known]))
    return torch.tensor(values, dtype=torch.float64)


def _average_precision(p: Tensor, y: Tensor) -> float:
    # A number outside [0, 1] would make torchmetrics squash all of them, which makes ties.
    return float(binary_average_precision(p.clamp(0, 1), y)) if bool(y.any()) else torch.nan


def _calibration_error(p: Tensor, y: Tensor) -> float:
    return binary_expected_calibration_error(p, y) if len(y) else torch.nan


def _of_pooled(metric: Metric) -> Metric:
    """Return the metric of the known labels; NaN where none is, as in resamples of few."""

    def of_known(p: Tensor, y: Tensor) -> float:
        classes, labels = pooled(p, y)
        return metric(classes, labels) if len(labels) else torch.nan

    return of_known


LABEL_METRICS: dict[str, Metric] = {
    "mAP": mean_average_precision,
    "per-label ECE": label_ece,
    **{name: _of_pooled(metric) for name, metric in METRICS.items()},
}
