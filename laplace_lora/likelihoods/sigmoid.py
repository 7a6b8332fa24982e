"""The sigmoid of a Gaussian logit, integrated by a trapezoidal rule.

After the substitution ``f = (π/s) sinh t`` in units of the deviation, which keeps the poles of
``σ`` at a distance of ``π/2`` however wide the Gaussian (Tee and Trefethen 2006, *A rational
spectral collocation method with adaptively transformed Chebyshev grid points*, for the
substitution; Trefethen and Weideman 2014, *The exponentially convergent trapezoidal rule*). All
terms are positive, so small probabilities have small relative errors. Gauss-Hermite nodes would
need thousands for a deviation of 50.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NODES = 64
HALF_WIDTH = 9.0  # of the trapezoidal rule, in standard deviations
NOT_POSITIVE = "the predictive covariance is not finite or far from positive"
SMALLEST_VARIANCE = 1e-12  # changes σ by 1e-13; nodes of a narrower Gaussian would be rounded
ROUNDING = 1e-6  # how far below zero rounding may take a variance


def binary_log_probabilities(mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``log E[σ(−f)]`` and ``log E[σ(f)]`` for Gaussian ``f``.

    Args:
        mean: Mean of ``f``, ``(…)``.
        variance: Its variance, ``(…)``.

    Returns:
        Shape ``(…, 2)``; errors below 1e-8 for means and deviations up to 50.

    Raises:
        FloatingPointError: If a variance is not finite or far from positive.
    """
    wide, deviation = mean.double(), _deviation(variance)
    sides = [_log_sigmoid_mean(-wide, deviation), _log_sigmoid_mean(wide, deviation)]
    return torch.stack(sides, dim=-1).clamp(max=0).to(mean.dtype)  # which rounding may exceed


def mean_binary_entropy(mean: Tensor, variance: Tensor) -> Tensor:
    """Return ``E[H(σ(f))]`` in nats for Gaussian ``f``, ``H`` the entropy of two classes.

    Args:
        mean: Mean of ``f``, ``(…)``.
        variance: Its variance, ``(…)``.

    Returns:
        Shape ``(…)``; by the rule of `binary_log_probabilities`, with errors below 1e-8.

    Raises:
        FloatingPointError: If a variance is not finite or far from positive.
    """
    wide, deviation = mean.double(), _deviation(variance)
    with torch.no_grad():  # the integrand falls like exp(−|f|) on both sides
        peak = (-wide / deviation).clamp(-deviation, deviation)
    f, log_weights = _nodes(wide, deviation, peak)
    values: Tensor = torch.special.entr(f.sigmoid()) + torch.special.entr((-f).sigmoid())
    return (values * log_weights.exp()).sum(-1).to(mean.dtype)


def _deviation(variance: Tensor) -> Tensor:
    # NaN compares as false.
    if not bool(((variance >= -ROUNDING) & (variance < math.inf)).all()):
        raise FloatingPointError(NOT_POSITIVE)
    return variance.double().clamp(min=SMALLEST_VARIANCE).sqrt()


def _log_sigmoid_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    with torch.no_grad():
        peak = torch.minimum((-mean / deviation).clamp(min=0), deviation)
    f, log_weights = _nodes(mean, deviation, peak)
    return (F.logsigmoid(f) + log_weights).logsumexp(-1)


def _nodes(mean: Tensor, deviation: Tensor, peak: Tensor) -> tuple[Tensor, Tensor]:
    """Return values of ``f`` and log weights, ``(…, NODES)``.

    Args:
        mean: Mean of ``f``.
        deviation: Its standard deviation.
        peak: Where the integrand is largest, in deviations from the mean.
    """
    with torch.no_grad():  # nodes may lie anywhere; gradients flow through the integrand
        scale = math.pi / deviation
        origin = -mean / deviation
        low = torch.asinh((peak - HALF_WIDTH - origin) / scale)
        high = torch.asinh((peak + HALF_WIDTH - origin) / scale)
        steps = torch.linspace(0, 1, NODES, dtype=mean.dtype, device=mean.device)
        t = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * steps
        z = origin.unsqueeze(-1) + scale.unsqueeze(-1) * t.sinh()
        spacing = (scale * (high - low) / (NODES - 1)).unsqueeze(-1) * t.cosh()
        log_weights = spacing.log() - z.square() / 2 - 0.5 * math.log(2 * math.pi)
    return mean.unsqueeze(-1) + deviation.unsqueeze(-1) * z, log_weights
