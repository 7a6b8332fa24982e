"""Calibrating a classifier's posterior on a validation set.

Three numbers, chosen together on the validation NLL from one cached pass: a factor of the prior
precision, a scale of the predictive covariance and a temperature of the likelihood. Marginal
likelihood can miss the width of a posterior severalfold where the model is misspecified; a few
hundred labels correct that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Likelihood, Scoring
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.calibration_error import expected_calibration_error
from laplace_lora.tuning.validation_cache import ValidationCache

LIMIT = 25.0  # of the logarithms that are searched
FOLDS = 5
OPTIONS = {"xatol": 1e-3, "fatol": 1e-7, "maxiter": 200}


@dataclass(frozen=True)
class Calibration:
    """What a calibration chose, and what it changed on the validation set.

    Attributes:
        prior_precision: The new prior precision, scalar or one value a tensor.
        covariance_scale: Factor of the predictive covariance.
        likelihood_temperature: What logits are divided by before the softmax.
        nll_before: Mean validation NLL before, in nats.
        nll_after: And after; on the rows that the choice was made from.
        nll_cross_fitted: After, each fifth of the rows under the values chosen from the others:
            what to expect on new data.
        ece_before: Expected calibration error before, 15 equal-width bins, a fraction.
        ece_after: And after.
    """

    prior_precision: Tensor
    covariance_scale: float
    likelihood_temperature: float
    nll_before: float
    nll_after: float
    nll_cross_fitted: float
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
            f"-> {self.nll_after:.4f} ({self.nll_cross_fitted:.4f} cross-fitted), ECE "
            f"{self.ece_before:.4f} -> {self.ece_after:.4f}"
        )


def calibrate(
    predictor: Predictor, loader: Any, team: Together, scoring: Scoring, progress_bar: bool
) -> tuple[Settings, Calibration]:
    """Choose prior factor, covariance scale and likelihood temperature.

    A coarse grid finds the valley, Nelder-Mead its bottom; every candidate sees the same samples.
    If nothing beats the start, the start stays.

    Args:
        predictor: Of a fitted classifier's posterior; its present settings are the start.
        loader: Validation batches with labels.
        team: The processes that share the loader.
        scoring: How predictions are scored.
        progress_bar: Show progress over the batches.

    Returns:
        The settings, and what they changed.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    posterior = predictor.posterior
    settings = posterior.settings
    groups = torch.zeros(len(posterior.names), dtype=torch.long)
    cache = ValidationCache(predictor, loader, groups, scoring.readout, progress_bar, team=team)
    start = (
        0.0,
        math.log(settings.covariance_scale),
        math.log(settings.likelihood_temperature),
    )

    def moments(point: Any) -> tuple[Tensor, Tensor]:
        factor, scale, temperature = (_exponential(value) for value in point)
        covariance = cache.covariance(cache.mean.new_tensor([factor]))
        return cache.mean / temperature, covariance * (scale / temperature**2)

    def losses(point: Any) -> Tensor:
        return scoring.nll(*moments(point), cache.y).double()

    def nll(point: Any, rows: Tensor) -> float:
        value = losses(point)[rows].mean().item()
        return value if math.isfinite(value) else 1e30

    def ece(point: Any) -> float:
        mean, covariance = moments(point)
        ((probabilities,),) = scoring.metric_arguments(mean, covariance.unsqueeze(0))
        return expected_calibration_error(probabilities, cache.y)

    candidates = [
        (factor * math.log(10), scale * math.log(10), temperature)
        for factor in (-3, -2, -1, 0, 1, 2, 3)
        for scale in (-1.5, -1, -0.5, 0, 0.5, 1, 1.5)
        for temperature in (-0.7, -0.35, 0.0, 0.35, 0.7)
    ]
    points = [start, *candidates]
    table = torch.stack([losses(point) for point in points]).nan_to_num(torch.inf, torch.inf)

    def lowest(rows: Tensor) -> Any:
        """Return the best point for some rows; the start, if nothing beats it."""
        order = table[:, rows].mean(1).argsort(stable=True)[:3].tolist()
        found = [
            minimize(nll, points[i], (rows,), method="Nelder-Mead", options=OPTIONS).x
            for i in order
        ]
        return min([start, *found], key=lambda point: nll(point, rows))

    everything = torch.ones(len(cache.y), dtype=torch.bool, device=cache.y.device)
    best = lowest(everything)
    before, after = nll(start, everything), nll(best, everything)
    folds = torch.arange(len(cache.y), device=cache.y.device) % min(FOLDS, len(cache.y))
    cross_fitted = sum(
        float(losses(lowest(folds != fold) if len(folds) > 1 else best)[folds == fold].sum())
        for fold in folds.unique()
    )
    factor, scale, temperature = (_exponential(value) for value in best)
    chosen = replace(
        settings,
        prior_precision=settings.prior_precision * factor,
        covariance_scale=scale,
        likelihood_temperature=temperature,
    )
    report = Calibration(
        chosen.prior_precision,
        scale,
        temperature,
        before,
        after,
        cross_fitted / len(folds),
        ece(start),
        ece(best),
    )
    return chosen, report


def check_classifier(objective: Likelihood) -> None:
    """Refuse a likelihood without class probabilities.

    Raises:
        ValueError: If the likelihood is not a classifier's.
    """
    if not objective.is_classifier:
        raise ValueError(
            f"calibrate needs a classifier; tune a {objective.name} posterior by marginal "
            "likelihood"
        )


def _exponential(value: float) -> float:
    return math.exp(min(max(value, -LIMIT), LIMIT))
