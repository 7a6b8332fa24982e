"""Warn of a posterior that is so wide that it predicts its own training examples badly."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch

from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.state import Posterior
from laplace_lora.tuning.validation_cache import scoring_of

EXAMPLES = 128
LIMIT = 0.1  # nats


def warn_if_wide(posterior: Posterior, loader: Iterable[Any]) -> None:
    """Warn if the predictive of training examples is worse than the MAP's by more than 0.1 nats.

    Looks at about a hundred examples of each process. Likelihoods without class probabilities are
    left alone.

    Args:
        posterior: A tuned posterior.
        loader: Its training data.
    """
    if not posterior.objective.is_classifier:
        return
    excess, seen = 0.0, 0.0
    with together(loader) as team:
        scoring, predictor = scoring_of(posterior, QUADRATURE, 0), Predictor(posterior)
        for batch in team.batches(loader, "", by_example=posterior.by_example):
            x, y = posterior.split(batch)
            mean, wide = predictor.readout_moments(x, scoring.readout)
            losses = [scoring.nll(mean, each, y) for each in (wide, torch.zeros_like(wide))]
            excess += float((losses[0] - losses[1]).double().sum())
            seen += len(y)
            if seen >= EXAMPLES:
                break
        excess, seen = team.total(excess, seen)
    if seen and excess / seen > LIMIT:
        warnings.warn(
            f"the posterior predicts its training examples worse than the MAP, by "
            f"{excess / seen:.2f} nats: it is too wide, and so will predictions be. Tune by "
            "method='loo', or with validation labels (`calibrate`, method='gridsearch')",
            stacklevel=3,
        )
