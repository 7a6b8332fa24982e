"""Gram matrices ``Z R⁻¹ Zᵀ`` of rows under a prior, whole or by groups of tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from laplace_lora.linalg.row_storage import RowStorage


def gram_matrix(rows: RowStorage, pattern: Sequence[Tensor]) -> Tensor:
    """Return ``Z R⁻¹ Zᵀ``; gradients flow through the pattern.

    In float64 throughout: a log determinant depends on small eigenvalues as much as on large ones,
    and rounding would change them.

    Args:
        rows: ``Z``.
        pattern: ``R``'s part for each tensor, a scalar or one value per entry.

    Returns:
        Float64, ``(rows, rows)``.
    """
    return group_grams(rows, pattern, [0] * len(pattern))[0]


def group_grams(rows: RowStorage, pattern: Sequence[Tensor], groups: Sequence[int]) -> list[Tensor]:
    """Return the parts of ``Z R⁻¹ Zᵀ`` that groups of tensors contribute.

    Args:
        rows: ``Z``.
        pattern: ``R``'s part for each tensor.
        groups: Group of each tensor.

    Returns:
        Float64, ``(rows, rows)`` for each group.
    """
    count, m = max(groups) + 1, len(rows)
    zeros = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
    totals = [zeros.clone() for _ in range(count)]
    for i, group in enumerate(groups):
        weight = pattern[i].double()
        for columns, Z in rows.pieces(i, torch.float64):
            if weight.ndim:
                totals[group] = totals[group] + (Z / weight[columns]) @ Z.T
            elif weight.requires_grad:
                totals[group] = totals[group] + Z @ Z.T / weight
            else:
                totals[group].addmm_(Z, Z.T, alpha=1 / float(weight))
    return totals
