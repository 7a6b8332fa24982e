"""Narrow a language model's posterior until its predictive still fits the training texts.

The evidence counts how well the linearised model fits, and nothing of what its samples do to the
tokens that it has learnt: a posterior as wide as it asks for forgets them. So the width is bounded
by the predictive itself. Samples of the linearised model are linear in their deviation from the
MAP, so one pass over some training texts gives the predictive at every width.

Source: training-free Bayesianisation takes the widest Gaussian within a tolerance, too (Shi et al.
2024, arXiv:2412.05723), by repeated evaluation of sampled weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from laplace_lora.data.distributed import Together
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.texts.training_texts import TextLosses, some_texts, text_losses

TOLERANCE = 0.0025  # nats per scored token; held-out texts lose about twice as much
DECADES = torch.arange(9, dtype=torch.float64)  # of the covariance, downwards
STEPS = 10  # in a decade


@dataclass(frozen=True)
class Widest:
    """What a bound of a posterior's width by training texts found.

    Attributes:
        covariance_scale: Factor of the covariance: 1 where the width that the evidence asks for is
            within the tolerance.
        nll_map: NLL of training texts under the MAP, in nats per scored token.
        nll_evidence: Under the posterior that the evidence asks for.
        nll: Under the posterior with its covariance scaled.
        tokens: How many scored tokens were looked at.
    """

    covariance_scale: float
    nll_map: float
    nll_evidence: float
    nll: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"widest: covariance scale {self.covariance_scale:.3g}; NLL of {self.tokens} training "
            f"tokens {self.nll_map:.4f} by the MAP, {self.nll:.4f} by the posterior "
            f"({self.nll_evidence:.4f} with the width that the evidence asks for)"
        )


def tune(
    posterior: Posterior, loader: Any, team: Together, progress_bar: bool | None
) -> tuple[Settings, Widest]:
    """Choose the widest covariance that keeps the NLL of training texts within the tolerance.

    At most as wide as it is, and such that every narrower width that was tried is within the
    tolerance, too: first by decades, then in between, in one pass each over the same texts.

    Args:
        posterior: A fitted posterior with the prior that maximises the evidence, uncalibrated.
        loader: Its training data.
        team: The processes that share the data; each reads some of its own.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        The settings, and what was found.

    Raises:
        ValueError: If the likelihood is none of tokens, the model cannot carry tangents,
            or no token of the data is scored.
        FloatingPointError: If the predictive of the narrowest posterior is not the MAP's.
    """
    if posterior.objective.jacobian_refusal is None:
        raise ValueError(
            f"method='widest' reads the tokens of texts; a {posterior.objective.name} posterior "
            "has method='loo' or 'marglik'"
        )
    texts = some_texts(posterior, team.batches(loader, "Choosing texts", progress_bar))
    scales = 10**-DECADES
    losses = text_losses(posterior, texts, scales, team)
    unscaled = float(losses.nll[0])
    best = _widest(losses)
    if best == len(scales):
        raise FloatingPointError(
            "even the narrowest predictive is worse than the MAP's on the training texts"
        )
    if best > 0:
        steps = torch.arange(1, STEPS + 1, dtype=torch.float64) / STEPS
        scales = scales[best - 1] * 10**-steps
        losses = text_losses(posterior, texts, scales, team)
        best = min(_widest(losses), STEPS - 1)
    scale = float(scales[best])
    report = Widest(scale, losses.nll_map, unscaled, float(losses.nll[best]), losses.tokens)
    return replace(posterior.settings, covariance_scale=scale), report


def _widest(losses: TextLosses) -> int:
    """Return the index of the widest that is within the tolerance, as are all after it."""
    outside = (~(losses.nll - losses.nll_map <= TOLERANCE)).nonzero()  # NaN is not within
    return int(outside.max()) + 1 if len(outside) else 0
