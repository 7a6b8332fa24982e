"""Further directions of the subspace in which the evidence's gradient term is exact.

The term ``½ bᵀ P⁻¹ b`` is what conjugate gradients for ``P⁻¹ b`` approach from below. So a step
takes the remainder ``b − P V x`` of the best solution so far, preconditioned by the posterior's own
curvature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.subspace import Subspace
from laplace_lora.tuning.directions import preconditioned
from laplace_lora.tuning.evidence.corrected import HIGHEST, corrected_precision
from laplace_lora.tuning.evidence.marginal_likelihood import with_first_precision
from laplace_lora.tuning.same_data import check_same_data

PURPOSE = "the evidence's gradient term"
MEASURING = "Measuring curvature"  # on the progress bar
SOLVED = 1e-6  # remainder relative to the whole, below which the term is exact


def asked_for(posterior: Posterior, subspace: Subspace) -> float:
    """Return the scalar prior precision at the largest evidence with a subspace's term.

    Args:
        posterior: A fitted posterior that knows the loss's gradient.
        subspace: Measured on its data.

    Returns:
        The precision; the largest that is searched, where no smaller one is credible.
    """
    found = replace(posterior, state=replace(posterior.state, subspace=subspace))
    scalar = with_first_precision(found)
    try:
        groups = torch.zeros(len(found.names), dtype=torch.long)
        precision = corrected_precision(scalar, groups).precisions
    except FloatingPointError:
        return HIGHEST
    return float(precision)


def next_directions(
    posterior: Posterior,
    directions: Tensor,
    subspace: Subspace,
    delta: float,
    summed: Callable[[Pass], Sums],
    step: int,
) -> Tensor | None:
    """Return the remainder of ``P⁻¹ b``, preconditioned, from one pass over the data.

    Args:
        posterior: A fitted posterior that knows the loss's gradient.
        directions: Orthonormal directions of the subspace, ``(m, parameters)``.
        subspace: What was measured along them.
        delta: Prior precision, a scalar, in ``P`` and ``b``.
        summed: Iterates over all its data and returns the sums.
        step: Number of the step.

    Returns:
        The directions, ``(n, parameters)``; ``None`` if there is no remainder.

    Raises:
        ValueError: If the data are not those of the fit.
    """
    engine, exact = posterior.engine, posterior.needs_own_root
    scale, gradient = float(posterior.scale.detach()), posterior.state.loss_gradient
    assert gradient is not None
    prior = torch.full((1,), delta, dtype=torch.float64)
    solution = (subspace.solution(prior, scale) @ directions.double()).to(gradient)
    parts = solution.split(engine.sizes)

    def of_batch(x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        with torch.random.fork_rng():  # where labels are drawn, both sweeps see the same
            loss, blocks = engine.root_blocks(x, y, exact=exact)
            along: Any = 0.0
            for part, block in zip(parts, blocks, strict=True):
                along = along + block.flatten(2) @ part
        _, blocks = engine.root_blocks(x, y, exact=exact)
        rows = [torch.einsum("nk,nkp->p", along, block.flatten(2)) for block in blocks]
        return loss, torch.cat(rows).to(gradient)

    labels = (f"evidence-product-{step}", MEASURING)
    product = checked_sum(posterior, summed, of_batch, *labels, [solution])
    displacement = posterior.state.displacement.to(gradient)
    b = -scale * gradient - delta * displacement
    remainder = b - scale * product - delta * solution
    if float(remainder.norm()) <= SOLVED * float(b.norm()):
        return None
    return preconditioned(posterior, remainder, delta)


def checked_sum(
    posterior: Posterior,
    summed: Callable[[Pass], Sums],
    of_batch: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
    name: str,
    title: str,
    basis: Sequence[Tensor] = (),
) -> Tensor:
    """Return the sum over the data of the fit of what is computed, with the loss, of a batch.

    Raises:
        ValueError: If the data are not those of the fit.
    """

    def add(total: Tensor | None, x: Any, y: Tensor) -> tuple[Tensor, Tensor]:
        loss, part = of_batch(x, y)
        return loss, part if total is None else total.add_(part)

    sums = summed(Pass(add, lambda total: [total], name, title, basis))
    check_same_data(posterior.state, sums.n, sums.loss, PURPOSE)
    total: Tensor = sums.state
    return total
