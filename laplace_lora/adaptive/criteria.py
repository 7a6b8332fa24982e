"""Importance of single weights as functions of their posterior mean and standard deviation.

Source: Chen and Garner (2024), *A Bayesian Interpretation of Adaptive Low-Rank Adaptation*,
arXiv:2409.10673.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Criterion:
    """A score of single weights.

    Attributes:
        name: Name of the criterion.
        function: From mean and standard deviation to scores, elementwise.
        values_only: Score a triplet by its singular value alone.
    """

    name: str
    function: Function
    values_only: bool = False


def snr_magnitude(mean: Tensor, std: Tensor) -> Tensor:
    """Return the signal-to-noise ratio of ``|θ|``: ``M/√(σ² + μ² − M²)`` with ``M = E|θ|``.

    In terms of ``t = |μ|/σ`` and ``d = M/σ − t = √(2/π) e^{−t²/2} − t erfc(t/√2)`` it is ``(t +
    d)/√(1 − d(2t + d))``, which stays accurate for large ``t``; the textbook form breaks down in
    float32 above ``t ≈ 4·10³``. The value at ``t = 0`` is 1.3236.
    """
    t = mean.abs() / std
    d = math.sqrt(2 / math.pi) * torch.exp(-t.square() / 2) - t * torch.erfc(t / math.sqrt(2))
    return (t + d) / torch.sqrt(1 - d * (2 * t + d))


def snr(mean: Tensor, std: Tensor) -> Tensor:
    """Return the signal-to-noise ratio ``|μ|/σ``."""
    return mean.abs() / std


def magnitude(mean: Tensor, std: Tensor) -> Tensor:
    """Return ``|μ|``."""
    return mean.abs()


def precision_root(mean: Tensor, std: Tensor) -> Tensor:
    """Return ``1/σ``."""
    return 1 / std


def pruning_cost(mean: Tensor, std: Tensor) -> Tensor:
    """Return ``½ (μ/σ)²``, the log density in nats lost by setting the weight to zero."""
    return 0.5 * (mean / std).square()


CRITERIA = {
    "snr_magnitude": Criterion("snr_magnitude", snr_magnitude),
    "snr": Criterion("snr", snr),
    "magnitude": Criterion("magnitude", magnitude),
    "precision_root": Criterion("precision_root", precision_root),
    "pruning_cost": Criterion("pruning_cost", pruning_cost, values_only=True),
}
ALIASES = {  # names in the paper's repository
    "SNR_mean_abs": "snr_magnitude",
    "SNR": "snr",
    "mean": "magnitude",
    "sigma": "precision_root",
}


def criterion_of(criterion: str | Function | Criterion) -> Criterion:
    """Return a criterion by name or alias, or one made from a function.

    Args:
        criterion: A name or alias, a function ``(mean, std) -> score``, or a criterion.

    Raises:
        ValueError: If no criterion has that name.
    """
    if isinstance(criterion, Criterion):
        return criterion
    if callable(criterion):
        return Criterion(getattr(criterion, "__name__", "custom"), criterion)
    name = ALIASES.get(criterion, criterion)
    if name not in CRITERIA:
        raise ValueError(f"criterion must be one of {[*CRITERIA, *ALIASES]}, got {criterion!r}")
    return CRITERIA[name]
