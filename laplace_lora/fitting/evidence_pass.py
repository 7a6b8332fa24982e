"""The pass that measures the exact curvature along a few directions, for the evidence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.structures.state import Posterior
from laplace_lora.structures.subspace import Subspace, spanned

SHIFTS = (1.0, 30.0, 1000.0)  # prior precisions at which the structure's own inverse is tried


def subspace_of(posterior: Posterior, summed: Callable[[Pass], Sums]) -> Subspace:
    """Return the exact curvature along the gradient, the displacement and what follows from them.

    The further directions are the products of the two with the structure's own curvature ``K``, and
    ``(K + δ)⁻¹ g``: they take the place of Krylov vectors, which would cost a pass each.

    Args:
        posterior: A fitted posterior that knows the loss's gradient.
        summed: Iterates over all its data and returns the sums.

    Raises:
        ValueError: If the data are not those of the fit.
    """
    engine, structure, state = posterior.engine, posterior.structure, posterior.state
    curvature, gradient = state.curvature, state.loss_gradient
    assert gradient is not None
    displacement = posterior.mean - posterior.settings.prior_mean
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
    sums = summed(data_pass)
    if sums.n != state.n_data:
        raise ValueError(
            f"the loader gives {sums.n} examples, the fit saw {state.n_data}; the evidence's "
            "gradient term needs the training data of the fit"
        )
    products = spanned(directions, sums.state, gradient, displacement, engine.sizes)
    return Subspace(*products, posterior.settings.prior_mean)
