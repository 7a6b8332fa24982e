"""Directions of the weights in which something is exact: the next ones, and orthonormal ones."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.structures.state import Posterior

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
    """Return directions of the same span, so that no small difference is ever taken."""
    directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
    rows: Tensor = torch.linalg.qr(directions.double().T).Q.T
    return rows.to(directions)
