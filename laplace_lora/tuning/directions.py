"""Directions of the weights in which something is exact: the next ones, and orthonormal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.structures.posterior import Posterior

# Share of the largest singular value that is rounding.
DEPENDENT = {torch.float64: 1e-10, torch.float32: 1e-6}
WIDER = (1.0, 30.0, 1000.0)  # factors of the prior precision in the preconditioner


def preconditioned(posterior: Posterior, remainder: Tensor, delta: float) -> Tensor:
    """Return where to look for what is left of a solution, ``(n, parameters)``.

    The remainder itself, and solved for by the posterior's own curvature under several priors.

    Args:
        posterior: A fitted posterior.
        remainder: What is left, ``(parameters,)``.
        delta: Prior precision of the system that is solved.
    """
    structure, curvature = posterior.structure, posterior.state.curvature
    rows, scale = remainder.unsqueeze(0), float(posterior.scale.detach())
    solved = [structure.solve(curvature, rows, factor * delta / scale) for factor in WIDER]
    return torch.cat([*solved, rows])


def orthonormal(directions: Tensor) -> Tensor:
    """Return directions of the same span, so that no small difference is ever taken.

    Those that depend on others are left out, of which nothing but rounding would be left.
    """
    wide = directions.double()
    wide = wide / wide.norm(dim=1, keepdim=True).clamp(min=1e-30)
    basis, coordinates = torch.linalg.qr(wide.T)
    turned, values, _ = torch.linalg.svd(coordinates)
    count = max(int((values > DEPENDENT[directions.dtype] * values[0]).sum()), 1)
    rows: Tensor = (basis @ turned[:, :count]).T
    return rows.to(directions)
