"""The prior precision that maximises the log marginal likelihood, from eigenvalues alone.

For fixed noise the evidence is a sum over groups of tensors with one precision each,
``−½ [Σ log(1 + e/δ) + δ ‖θ − μ₀‖²]``. Its derivative in ``log δ`` is half of ``γ(δ) − δ ‖θ − μ₀‖²``
with the effective number of parameters ``γ(δ) = Σ e/(e + δ)`` (MacKay 1992, *Bayesian
interpolation*), which falls from positive to negative: one root, found by bisection, with no step
size to choose and no pass through the model. Where the curvature couples the groups, see
`corrected`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from laplace_lora.structures.base import Spectrum

BOUNDS = (1e-10, 1e12)
ITERATIONS = 80


def effective_parameters(spectra: list[Spectrum], deltas: Tensor) -> Tensor:
    """Return how many directions of each tensor the data determine, ``Σ e/(e + δ)``.

    Args:
        spectra: Curvature eigenvalues of each tensor, with how often each counts.
        deltas: Prior precision of each tensor, ``(tensors,)``.

    Returns:
        Float64, shape ``(tensors,)``.
    """
    sums = [
        sum((times * (e.double() / (e.double() + delta)).sum() for e, times in spectrum), delta * 0)
        for spectrum, delta in zip(spectra, deltas.double(), strict=True)
    ]
    return torch.stack(sums)


def optimal_precision(spectra: list[Spectrum], squares: Tensor, groups: Tensor) -> Tensor:
    """Return the evidence's maximum over one prior precision per group.

    Where the data say nothing about a group, or its weights stand at the prior mean, the maximum
    lies at infinity; the precision then ends at a bound, 1e-10 or 1e12.

    Args:
        spectra: Curvature eigenvalues of each tensor, with how often each counts.
        squares: ``‖θ − μ₀‖²`` of each tensor, ``(tensors,)``.
        groups: Group of each tensor, ``(tensors,)``.

    Returns:
        Float64 precisions, shape ``(groups,)``.
    """
    count = int(groups.max()) + 1

    def by_group(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add_(0, groups, values)

    norms = by_group(squares.double())
    low = torch.full_like(norms, math.log(BOUNDS[0]))
    high = torch.full_like(norms, math.log(BOUNDS[1]))
    for _ in range(ITERATIONS):
        middle = (low + high) / 2
        deltas = middle.exp()
        rising = by_group(effective_parameters(spectra, deltas[groups])) > deltas * norms
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    return ((low + high) / 2).exp()


def optimal_noise(
    spectra_at: Callable[[float], list[Spectrum]],
    squares: Tensor,
    groups: Tensor,
    loss: float,
    observations: int,
    start: float,
) -> float:
    """Return the observation noise that maximises the evidence, the prior at its best for each.

    At the maximum ``2 loss/σ² = observations − γ`` (MacKay 1992): the residuals share their noise
    with the parameters that fit it.

    Args:
        spectra_at: From a noise ``σ`` to the curvature's spectra.
        squares: ``‖θ − μ₀‖²`` of each tensor.
        groups: Group of each tensor.
        loss: Half the sum of squared residuals, over the temperature.
        observations: Examples times outputs.
        start: Centre of the search, which spans six decades either way.

    Returns:
        The noise ``σ``.
    """
    low, high = math.log(start) - 6 * math.log(10), math.log(start) + 6 * math.log(10)
    for _ in range(ITERATIONS // 2):
        middle = (low + high) / 2
        noise = math.exp(middle)
        spectra = spectra_at(noise)
        deltas = optimal_precision(spectra, squares, groups)[groups]
        gamma = effective_parameters(spectra, deltas).sum().item()
        rising = 2 * loss / noise**2 > observations - gamma
        low, high = (middle, high) if rising else (low, middle)
    return math.exp((low + high) / 2)
