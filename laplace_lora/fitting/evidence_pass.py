"""The passes that measure what the evidence's gradient term needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.fitting.further_directions import (
    MEASURING,
    asked_for,
    checked_sum,
    next_directions,
)
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import copied
from laplace_lora.structures.state import PosteriorState
from laplace_lora.structures.subspace import Subspace, spanned
from laplace_lora.tuning.directions import orthonormal

# Prior precisions at which the structure's own inverse is tried. Not factors of one, as those of
# `preconditioned`: the evidence has not asked for any yet.
SHIFTS = (1.0, 30.0, 1000.0)
STEPS = 4
STABLE = math.log(1.1)  # of the prior precision that the evidence asks for


def with_gradient_term(posterior: Posterior, summed: Callable[[Pass], Sums]) -> PosteriorState:
    """Return the state of a posterior whose gradient term is known.

    One pass over the data for the loss's gradient where the fit has not collected it. Where the
    curvature itself does not do, three or more for the exact curvature along a few directions.

    Args:
        posterior: A fitted posterior.
        summed: Iterates over all its data and returns the sums.

    Raises:
        ValueError: If the data are not those of the fit.
    """
    state = posterior.state
    if state.loss_gradient is None:
        labels = ("gradient", "Collecting the gradient")
        gradient = checked_sum(posterior, summed, posterior.engine.loss_gradient, *labels)
        state = replace(state, loss_gradient=gradient)
        posterior = replace(posterior, state=state)
    if posterior.gradient_term is None:
        state = replace(state, subspace=subspace_of(posterior, summed))
    return state


def subspace_of(posterior: Posterior, summed: Callable[[Pass], Sums]) -> Subspace:
    """Return the exact curvature along the gradient, the displacement and what follows from them.

    The first directions are these two, the products of both with the structure's own curvature
    ``K``, and ``(K + δ)⁻¹ g``, all from one pass. Steps of two passes each take further ones, see
    `next_directions`, until one changes the prior precision that the evidence asks for by less than
    a tenth.

    Args:
        posterior: A fitted posterior that knows the loss's gradient.
        summed: Iterates over all its data and returns the sums.

    Raises:
        ValueError: If the data are not those of the fit.
    """
    structure, state = posterior.structure, posterior.state
    curvature, gradient = state.curvature, state.loss_gradient
    assert gradient is not None
    starts = torch.stack([gradient, state.displacement.to(gradient)])
    rows = [starts, structure.product(curvature, starts)]
    rows += [structure.solve(curvature, starts[:1], delta) for delta in SHIFTS]
    directions = orthonormal(torch.cat(rows))
    subspace = _measured(posterior, directions, summed, "evidence")
    delta = asked_for(posterior, subspace)
    for step in range(1, STEPS + 1):
        new = next_directions(posterior, directions, subspace, delta, summed, step)
        if new is None:
            break
        directions = orthonormal(torch.cat([directions, new]))
        subspace = _measured(posterior, directions, summed, f"evidence-{step}")
        before, delta = delta, asked_for(posterior, subspace)
        if abs(math.log(delta / before)) <= STABLE:
            break
    return subspace


def _measured(
    posterior: Posterior, directions: Tensor, summed: Callable[[Pass], Sums], name: str
) -> Subspace:
    """Measure the exact curvature along directions in one pass over the data."""
    engine, gradient = posterior.engine, posterior.state.loss_gradient
    assert gradient is not None
    parts = directions.split(engine.sizes, dim=1)
    exact = posterior.needs_own_root

    def of_batch(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, blocks = engine.root_blocks(x, y, exact=exact)
        along: Any = 0.0
        for part, block in zip(parts, blocks, strict=True):
            along = along + (block.flatten(2).flatten(0, 1) @ part.T).double()
        return loss, along.T @ along

    exact_matrix = checked_sum(posterior, summed, of_batch, name, MEASURING, [directions])
    displacement = posterior.state.displacement
    products = spanned(directions, exact_matrix, gradient, displacement, engine.sizes)
    return Subspace(*products, copied(posterior.settings.prior_mean))
