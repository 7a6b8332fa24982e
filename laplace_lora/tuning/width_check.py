"""Warn of a posterior that is so wide that it predicts its own training examples badly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from laplace_lora.data.distributed import together
from laplace_lora.data.messages import OtherProcessFailed, kind_of
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.left_out.leave_one_out import why_not
from laplace_lora.tuning.texts.training_texts import some_texts, text_losses
from laplace_lora.tuning.validation.cache import scoring_of

EXAMPLES = 128
LIMIT = 0.1  # nats


def warn_if_wide(posterior: Posterior, loader: Iterable[Any]) -> None:
    """Warn if the predictive of training data is worse than the MAP's by more than 0.1 nats.

    Looks at about a hundred examples, or at some texts, of each process; nats per example, or per
    scored token. A model of tokens that cannot carry tangents, see `forward_mode`, is left alone.
    """
    if posterior.objective.jacobian_refusal is not None:
        try:
            excess = _excess_of_texts(posterior, loader)
        except (NoForwardDerivativeError, OtherProcessFailed) as error:
            if kind_of(error) != NoForwardDerivativeError.__name__:
                raise
            return
    else:
        excess = _excess_of_examples(posterior, loader)
    if not excess <= LIMIT:  # NaN is not within
        warn(
            f"the posterior predicts its training examples worse than the MAP, by {excess:.2f} "
            f"nats: it is too wide, and so will predictions be. "
            f"{_advice(posterior, loader)}",
        )


def _advice(posterior: Posterior, loader: Iterable[Any]) -> str:
    if posterior.objective.jacobian_refusal is not None:
        return "Tune by method='widest'"
    others = "method='gridsearch'"
    if posterior.objective.can_be_calibrated:
        others = f"`calibrate`, {others}"
    without = "" if why_not(posterior, loader) else "by method='loo', or "
    return f"Tune {without}with validation labels ({others})"


def _excess_of_texts(posterior: Posterior, loader: Iterable[Any]) -> float:
    with together(loader, runs=posterior.source) as team:
        texts = some_texts(posterior, team.batches(loader, "Choosing texts"))
        losses = text_losses(posterior, texts, torch.ones(1), team)
    return float(losses.nll) - losses.nll_map


def _excess_of_examples(posterior: Posterior, loader: Iterable[Any]) -> float:
    excess, seen = 0.0, 0.0
    with together(loader, runs=posterior.source) as team:
        scoring, predictor = scoring_of(posterior, QUADRATURE, 0), Predictor(posterior)
        batches = team.batches(
            loader, "Checking the width", by_example=posterior.by_example, at_most=EXAMPLES
        )
        for batch in batches:
            x, y = posterior.split(batch)
            mean, wide = predictor.readout_moments(x, scoring.readout)
            losses = [scoring.nll(mean, each, y) for each in (wide, torch.zeros_like(wide))]
            excess += float((losses[0] - losses[1]).detach().double().sum())
            seen += len(y)
        excess, seen = team.total(excess, seen)
    return excess / max(seen, 1)
