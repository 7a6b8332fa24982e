"""Calibration metrics of class probabilities, as functions of probabilities and labels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_roc,
    multiclass_accuracy,
)

from laplace_lora.likelihoods import information
from laplace_lora.tuning.validation.calibration_error import BINS, expected_calibration_error

COVERAGES = (0.5, 0.8, 0.9)

ece = expected_calibration_error


def accuracy(p: Tensor, y: Tensor) -> float:
    """Return the share of examples whose most probable class is correct.

    Raises:
        ValueError: If probabilities are NaN, as of all metrics that need the most probable class.
    """
    check_numbers(p)
    return float(multiclass_accuracy(p, y, p.shape[1], average="micro"))


def nll(p: Tensor, y: Tensor) -> float:
    """Return the mean negative log likelihood in nats."""
    p = p.double()
    return float(F.nll_loss(p.clamp_min(torch.finfo(p.dtype).tiny).log(), y))


def brier(p: Tensor, y: Tensor) -> float:
    """Return the Brier score, squared errors summed over classes: between 0 and 2.

    Source: Brier (1950), *Verification of forecasts expressed in terms of probability*.
    """
    return float((p.double() - F.one_hot(y, p.shape[1])).square().sum(-1).mean())


def adaptive_ece(p: Tensor, y: Tensor) -> float:
    """Return the calibration error over 15 bins that hold equally many examples, a fraction.

    Examples of equal confidence share their errors evenly, so their order does not matter.

    Source: Nixon et al. (2019), arXiv:1904.01685.
    """
    confidence, order = p.max(-1).values.double().sort()
    gap = confidence - shared_by_equals(confidence, _correct(p, y)[order])
    return sum(abs(float(part.sum())) for part in gap.tensor_split(BINS)) / len(gap)


def debiased_ce(p: Tensor, y: Tensor) -> float:
    """Return the root mean square calibration error without the bias of few examples, a fraction.

    A perfect model has an expected ECE well above 0, since every bin's accuracy is noisy. Here the
    square of each bin's gap loses the variance of its accuracy, so that the square is unbiased;
    where less than nothing is left the error is 0. Bins hold equally many examples, at least two,
    as nearly as may be with examples of equal confidence all in one: shared among several bins,
    their errors would be no independent draws, and what is subtracted not their variance.

    Source: Kumar, Liang, Ma (2019), arXiv:1909.10155, the debiased estimator of section 5.
    """
    confidence, order = p.max(-1).values.double().sort()
    correct = _correct(p, y)[order]
    cuts = _cuts_between_levels(confidence)
    total = 0.0
    for right, said in zip(correct.tensor_split(cuts), confidence.tensor_split(cuts), strict=True):
        noise = float(right.mean() * (1 - right.mean())) / max(len(right) - 1, 1)
        total += len(right) * (float(right.mean() - said.mean()) ** 2 - noise)
    return math.sqrt(max(total / len(correct), 0.0))


def risk_coverage(p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the error rate among the n most confident examples, for every n.

    Examples of equal confidence share their errors evenly, so their order does not matter.

    Returns:
        Coverages ``1/N, …, 1`` and risks, ``(examples,)`` each, float64.
    """
    return risks(p.max(-1).values, 1 - _correct(p, y))


def risks(confidence: Tensor, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Return coverages and risks as `risk_coverage` does, whatever is wrong or right.

    Args:
        confidence: Of each example, ``(examples,)``.
        wrong: How wrong each is, likewise; 0 or 1.
    """
    errors = shared_by_equals(confidence, wrong.double())[confidence.argsort(descending=True)]
    accepted = torch.arange(1, len(errors) + 1, dtype=torch.float64, device=errors.device)
    return accepted / len(errors), errors.cumsum(0) / accepted


def aurc(p: Tensor, y: Tensor) -> float:
    """Return the area under the risk-coverage curve, the mean risk over all coverages.

    Source: Geifman and El-Yaniv (2017), arXiv:1705.08500.
    """
    return float(risk_coverage(p, y)[1].mean())


def accuracy_at(coverage: float) -> Callable[[Tensor, Tensor], float]:
    """Return a metric: the accuracy among the most confident examples.

    Args:
        coverage: Their share of all examples.

    Raises:
        ValueError: If ``coverage`` is not in (0, 1].
    """
    if not 0 < coverage <= 1:
        raise ValueError(f"coverage must lie in (0, 1], got {coverage}")

    def metric(p: Tensor, y: Tensor) -> float:
        # 0.8 · 5 is slightly above 4 in floating point.
        accepted = math.ceil(coverage * len(p) - 1e-9)
        return 1 - float(risk_coverage(p, y)[1][accepted - 1])

    return metric


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of each row in nats, ``(examples,)``, in float64."""
    return information.entropy(p.double())


def ood_auroc(inside: Tensor, outside: Tensor) -> float:
    """Return how well a score separates out-of-distribution examples, the positives, from others.

    Args:
        inside: Uncertainty of in-distribution examples; higher is less certain.
        outside: Uncertainty of out-of-distribution examples.
    """
    return float(binary_auroc(*_detection(inside, outside)))


def ood_fpr95(inside: Tensor, outside: Tensor) -> float:
    """Return the share of out-of-distribution examples accepted where 95 % of the others are.

    Source: Hendrycks and Gimpel (2017), arXiv:1610.02136, as used since.

    Args:
        inside: Uncertainty of in-distribution examples; higher is less certain.
        outside: Uncertainty of out-of-distribution examples.
    """
    scores, is_outside = _detection(inside, outside)
    # Not -scores: torchmetrics takes numbers outside [0, 1] for logits, and a sigmoid gives equal
    # ones different last digits, which breaks ties.
    outside_accepted, inside_accepted, _ = binary_roc(1 - scores, 1 - is_outside)
    return float(outside_accepted[inside_accepted >= 0.95].min())


METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "NLL": nll,
    "Brier": brier,
    "ECE": expected_calibration_error,
    "adaptive ECE": adaptive_ece,
    "debiased CE": debiased_ce,
    "AURC": aurc,
    **{f"accuracy at {share:.0%}": accuracy_at(share) for share in COVERAGES},
}


def check_numbers(p: Tensor) -> None:
    """Refuse probabilities that are not numbers, of which one would count as the largest.

    Raises:
        ValueError: If there are any.
    """
    if bool(p.isnan().any()):
        raise ValueError("probabilities that are not numbers (NaN) have no most probable class")


def _correct(p: Tensor, y: Tensor) -> Tensor:
    check_numbers(p)
    return (p.argmax(-1) == y).double()


def shared_by_equals(confidence: Tensor, values: Tensor) -> Tensor:
    """Return for each example the mean value of all examples of its confidence, ``(examples,)``."""
    _, group, count = confidence.unique(return_inverse=True, return_counts=True)
    means: Tensor = values.new_zeros(len(count)).index_add(0, group, values) / count
    return means[group]


def _cuts_between_levels(confidence: Tensor) -> list[int]:
    """Return where bins of nearly equal size begin that split no examples of equal confidence.

    Args:
        confidence: In ascending order, ``(examples,)``.

    Returns:
        Every bin's first example but the first bin's; bins hold two examples or more.
    """
    n = len(confidence)
    ends = confidence.unique_consecutive(return_counts=True)[1].cumsum(0)
    sizes = [len(part) for part in confidence.tensor_split(max(1, min(BINS, n // 2)))]
    cuts: list[int] = []
    for wanted in itertools.accumulate(sizes):
        cut = int(ends[(ends - wanted).abs().argmin()])
        if min(cut - (cuts[-1] if cuts else 0), n - cut) >= 2:
            cuts.append(cut)
    return cuts


def _detection(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores in [0, 1] of the same order, and which are out of distribution."""
    scores = torch.cat([inside, outside]).double()
    is_outside = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    is_outside[len(inside) :] = 1
    # torchmetrics takes scores outside [0, 1] for logits and squashes them, which makes ties.
    ranks = scores.unique(return_inverse=True)[1].double()
    return ranks / ranks.max().clamp(min=1), is_outside
