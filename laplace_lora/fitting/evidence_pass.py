"""The passes that measure what the evidence's gradient term needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.structures.state import Posterior, PosteriorState
from laplace_lora.structures.subspace import Subspace, spanned

SHIFTS = (1.0, 30.0, 1000.0)  # prior precisions at which the structure's own inverse is tried


def with_gradient_term(posterior: Posterior, summed: Callable[[Pass], Sums]) -> PosteriorState:
    """Return the state of a posterior whose gradient term is known.

    One pass over the data for the loss's gradient where the fit has not collected it, and one for
    the exact curvature along a few directions where the curvature itself does not do.

    Args:
        posterior: A fitted posterior.
        summed: Iterates over all its data and returns the sums.

    Raises:
        ValueError: If the data are not those of the fit.
    """
    state = posterior.state
    if state.loss_gradient is None:
        state = replace(state, loss_gradient=_gradient(posterior, summed))
        posterior = replace(posterior, state=state)
    if posterior.gradient_term is None:
        state = replace(state, subspace=subspace_of(posterior, summed))
    return state


def _gradient(posterior: Posterior, summed: Callable[[Pass], Sums]) -> Tensor:
    def add(total: Tensor | None, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient = posterior.engine.loss_gradient(x, y)
        return loss, gradient if total is None else total.add_(gradient)

    sums = summed(Pass(add, lambda total: [total], "gradient", "Collecting the gradient"))
    _check_count(posterior, sums)
    gradient: Tensor = sums.state
    return gradient


def _check_count(posterior: Posterior, sums: Sums) -> None:
    if sums.n != posterior.state.n_data:
        raise ValueError(
            f"the loader gives {sums.n} examples, the fit saw {posterior.state.n_data}; the "
            "evidence's gradient term needs the training data of the fit"
        )


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
    _check_count(posterior, sums)
    products = spanned(directions, sums.state, gradient, displacement, engine.sizes)
    return Subspace(*products, posterior.settings.prior_mean)
