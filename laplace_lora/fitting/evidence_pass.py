"""The pass of a fit that measures the exact curvature along a few directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.structures.state import Posterior
from laplace_lora.structures.subspace import Subspace, spanned

SHIFTS = (1.0, 30.0, 1000.0)  # prior precisions at which the structure's own inverse is tried


def subspace_of(
    posterior: Posterior, curvature: Any, gradient: Tensor, n: int, summed: Callable[[Pass], Sums]
) -> Subspace | None:
    """Return the exact curvature along the gradient, the displacement and what follows from them.

    The further directions are the products of the two with the structure's own curvature ``K``, and
    ``(K + δ)⁻¹ g``: they take the place of Krylov vectors, which would cost a pass each.

    Args:
        posterior: What is being fitted, for its model, structure and prior mean.
        curvature: Curvature of the data, ready for use.
        gradient: Gradient of the summed loss, ``(parameters,)``.
        n: Number of examples.
        summed: Iterates over the data and returns the sums.

    Returns:
        The subspace; ``None``, with a warning, if the data cannot be iterated over again.
    """
    engine, structure = posterior.engine, posterior.structure
    displacement = posterior.current_weights() - posterior.settings.prior_mean
    starts = torch.stack([gradient, displacement.to(gradient)])
    rows = [starts, structure.product(curvature, starts)]
    rows += [structure.solve(curvature, starts[:1], delta) for delta in SHIFTS]
    directions = torch.cat(rows)
    directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
    # Orthonormal, so that no small difference of large inner products is ever taken.
    directions = torch.linalg.qr(directions.double().T).Q.T.to(gradient)
    parts = directions.split(engine.sizes, dim=1)

    def add(total: Tensor | None, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, blocks = engine.root_blocks(x, y)
        along: Any = 0.0
        for part, block in zip(parts, blocks, strict=True):
            along = along + (block.flatten(2).flatten(0, 1) @ part.T).double()
        matrix: Tensor = along.T @ along
        return loss, matrix if total is None else total + matrix

    data_pass = Pass(add, lambda total: [total], "evidence", "Measuring curvature", [directions])
    try:
        sums = summed(data_pass)
    except ValueError:
        sums = Sums()  # an iterator that has run out
    if sums.n != n:
        warnings.warn(
            f"the loader gave {n} examples in the first pass and {sums.n} in the second, so the "
            "evidence stays without its gradient term; use a loader that can be iterated twice, or "
            "set evidence_correction=False",
            stacklevel=2,
        )
        return None
    products = spanned(directions, sums.state, gradient, displacement, engine.sizes)
    return Subspace(*products, posterior.settings.prior_mean)
