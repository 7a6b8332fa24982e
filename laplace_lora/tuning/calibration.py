"""Calibrating a classifier's posterior on a validation set.

Three numbers, chosen together on the validation NLL from one cached pass: a factor of the prior
precision, a scale of the predictive covariance and a temperature of the likelihood. Marginal
likelihood can miss the width of a posterior severalfold where the model is misspecified; a few
hundred labels mend that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_calibration_error

from laplace_lora.data.pairs import REWARD_MODELING
from laplace_lora.tuning.validation_cache import Scoring, ValidationCache

ECE_BINS = 15
LIMIT = 25.0  # of the logarithms that are searched


@dataclass(frozen=True)
class Calibration:
    """What a calibration chose, and what it changed on the validation set.

    Attributes:
        prior_precision: The new prior precision, scalar or one value a tensor.
        covariance_scale: Factor of the predictive covariance.
        likelihood_temperature: What logits are divided by before the softmax.
        nll_before: Mean validation NLL before, in nats.
        nll_after: And after.
        ece_before: Expected calibration error before, 15 equal-width bins, a fraction.
        ece_after: And after.
    """

    prior_precision: Tensor
    covariance_scale: float
    likelihood_temperature: float
    nll_before: float
    nll_after: float
    ece_before: float
    ece_after: float

    def __str__(self) -> str:
        prior = self.prior_precision
        spread = (
            f"{prior.min():.3g}" if len(prior) == 1 else f"{prior.min():.3g}..{prior.max():.3g}"
        )
        return (
            f"prior precision {spread}, covariance scale {self.covariance_scale:.3g}, likelihood "
            f"temperature {self.likelihood_temperature:.3g}: validation NLL {self.nll_before:.4f} "
            f"-> {self.nll_after:.4f}, ECE {self.ece_before:.4f} -> {self.ece_after:.4f}"
        )


def calibrate(
    la: Any, loader: DataLoader | None, scoring: Scoring, progress_bar: bool
) -> Calibration:
    """Choose and set prior factor, covariance scale and likelihood temperature.

    A coarse grid finds the valley, Nelder-Mead its bottom; every candidate sees the same samples.
    If nothing beats the start, the start stays.

    Args:
        la: A fitted classifier's posterior; its present settings are the start.
        loader: Validation batches with labels.
        scoring: How predictives are judged.
        progress_bar: Show progress over the batches.

    Returns:
        The settings, already in force, and the NLL and ECE before and after.

    Raises:
        ValueError: If the posterior is not a classifier's, there is no loader, it is empty, or a
            batch has no labels.
    """
    if la.likelihood not in ("classification", REWARD_MODELING):
        raise ValueError(
            f"calibrate needs a classifier; tune a {la.likelihood} posterior by marginal likelihood"
        )
    groups = torch.zeros(la.n_layers, dtype=torch.long)
    cache = ValidationCache(la, loader, groups, progress_bar)
    start = (0.0, math.log(la.covariance_scale), math.log(la.likelihood_temperature))

    def moments(point: Any) -> tuple[Tensor, Tensor]:
        factor, scale, heat = (math.exp(min(max(value, -LIMIT), LIMIT)) for value in point)
        covariance = cache.covariance(cache.mean.new_tensor([factor]))
        return cache.mean / heat, covariance * (scale / heat**2)

    def nll(point: Any) -> float:
        value = scoring.nll(*moments(point), cache.y).double().mean().item()
        return value if math.isfinite(value) else 1e30

    def ece(point: Any) -> float:
        probabilities = scoring.log_probabilities(*moments(point)).exp()
        classes = probabilities.shape[-1]
        return float(multiclass_calibration_error(probabilities, cache.y, classes, ECE_BINS, "l1"))

    candidates = [
        (factor * math.log(10), scale * math.log(10), heat)
        for factor in (-3, -2, -1, 0, 1, 2, 3)
        for scale in (-1.5, -1, -0.5, 0, 0.5, 1, 1.5)
        for heat in (-0.7, -0.35, 0.0, 0.35, 0.7)
    ]
    ranked = sorted([start, *candidates], key=nll)[:3]
    options = {"xatol": 1e-3, "fatol": 1e-7, "maxiter": 200}
    found = [minimize(nll, point, method="Nelder-Mead", options=options).x for point in ranked]
    before, best = nll(start), min(found, key=nll)
    if nll(best) >= before:
        best = start
    # In force only now: until here a failure has changed nothing.
    ece_before, ece_after, after = ece(start), ece(best), nll(best)
    best = [min(max(value, -LIMIT), LIMIT) for value in best]
    la.prior_precision = la.prior_precision * math.exp(best[0])
    la.covariance_scale, la.likelihood_temperature = math.exp(best[1]), math.exp(best[2])
    return Calibration(
        la.prior_precision,
        la.covariance_scale,
        la.likelihood_temperature,
        before,
        after,
        ece_before,
        ece_after,
    )
