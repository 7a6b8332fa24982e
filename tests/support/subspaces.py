"""Parts of the subspaces in which the evidence's gradient term is measured, and that term."""

from dataclasses import replace

import torch


def first(subspace, m):
    """What the first ``m`` directions say."""
    return replace(
        subspace,
        grams=subspace.grams[:, :m, :m],
        curvature=subspace.curvature[:m, :m],
        gradient=subspace.gradient[:m],
        displacement=subspace.displacement[:, :m],
    )


def term_of(subspace, delta):
    """``½ bᵀ P⁻¹ b`` within the span, as it is written; with unit scale."""
    b = -subspace.gradient - delta * subspace.displacement.sum(0)
    P = subspace.curvature + delta * subspace.grams.sum(0)
    return 0.5 * b @ torch.linalg.solve(P, b)
