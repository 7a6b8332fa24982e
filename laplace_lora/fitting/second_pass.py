"""The pass of a fit that corrects the eigenvalues of its Kronecker factors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature.batch_curvature import eigenbasis_diagonal
from laplace_lora.curvature.engine import Engine
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.structures.eigenvalue_correction import CorrectedKron


def corrected(
    engine: Engine, raw: CorrectedKron, n: int, summed: Callable[[Pass], Sums]
) -> CorrectedKron:
    """Return factors with the exact diagonal of the data that gave them.

    The diagonal is a sum over examples: it depends on neither batches, padding nor processes.

    Args:
        engine: The model and its likelihood.
        raw: The factors, with the diagonal of earlier data if any.
        n: Number of examples.
        summed: Iterates over the data and returns the sums.

    Raises:
        ValueError: If the pass sees another number of examples.
    """
    basis = raw.decompose()

    def add(diagonals: Any, x: Any, y: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss, more = eigenbasis_diagonal(engine, x, y, basis)
        earlier = diagonals or [torch.zeros_like(diagonal) for diagonal in more]
        return loss, [a + b for a, b in zip(earlier, more, strict=True)]

    sides = {id(side): side for block in basis.blocks for side in block}.values()
    vectors = [tensor for side in sides for tensor in side.basis()]
    sums = summed(Pass(add, list, "eigenvalues", "Correcting the eigenvalues", vectors))
    if sums.n != n:
        raise ValueError(
            f"the loader gave {n} examples in the first pass and {sums.n} in the second, which "
            "eigenvalue_correction needs; use one that can be iterated twice"
        )
    return raw.add(basis, sums.state)
