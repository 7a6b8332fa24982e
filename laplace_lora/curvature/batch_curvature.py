"""What one batch adds to a curvature: Kronecker factors, a diagonal, or a dense matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_lora.capture.jacobians import side_by_side
from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.kfac import KfacSums
from laplace_lora.curvature.kron_protocol import LowRankKron
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.kron_eigen import KronEigen


def add_factors(
    engine: Engine,
    x: Any,
    y: Tensor,
    spec: FactorSpec,
    sums: KfacSums | None = None,
    gradient: LossGradient | None = None,
) -> tuple[Tensor, KfacSums]:
    """Add a batch to K-FAC sums in place; starts them if there are none.

    Args:
        engine: The model and its likelihood.
        x: Batch that the model takes.
        y: Its labels.
        spec: Which sides are low-rank.
        sums: What earlier batches returned.
        gradient: Where the loss's gradient is added up.

    Returns:
        The summed loss of the batch, and the sums.

    Raises:
        ValueError: If labels lie outside the classes.
        FloatingPointError: If the loss or a sum is not finite; names the layer.
    """
    tape, loss = engine.forward(x, y, needs_masks=True)
    if sums is None:
        sums = KfacSums.empty(tape, spec, engine.dtype, engine.rows)
    root = engine.root(tape.output, y)
    if gradient is None:
        sums.update(tape, root)
    else:
        residual = engine.residual_columns(tape, root, y)
        sums.update(tape, root, (gradient, residual, engine.blocks))
    return loss, sums


def assembled(engine: Engine, sums: KfacSums, n: int, residual: str) -> LowRankKron:
    """Return sums over ``n`` examples as Kronecker factors in parameter order."""
    transposed = [linear.transposed for linear in engine.maps]
    return LowRankKron(sums.kfacs(engine.blocks, transposed, n), residual)


def diagonal(
    engine: Engine, x: Any, y: Tensor, gradient: LossGradient | None = None
) -> tuple[Tensor, Tensor]:
    """Return a batch's summed loss and the exact diagonal of its curvature, ``(parameters,)``."""
    loss, blocks = engine.root_blocks(x, y, gradient)
    return loss, torch.cat([rows.square().sum((0, 1)).flatten() for rows in blocks])


def rows(
    engine: Engine, x: Any, y: Tensor, gradient: LossGradient | None = None
) -> tuple[Tensor, Tensor]:
    """Return a batch's summed loss, and rows ``Z``, ``(rows, parameters)``, of ``Zᵀ Z``."""
    loss, blocks = engine.root_blocks(x, y, gradient)
    return loss, side_by_side(blocks).flatten(0, 1)


def eigenbasis_diagonal(
    engine: Engine, x: Any, y: Tensor, basis: KronEigen
) -> tuple[Tensor, list[Tensor]]:
    """Return the diagonal of the exact curvature in a Kronecker eigenbasis.

    Correlations between the tokens of an example count, unlike in the factors. A Monte-Carlo
    Fisher draws labels anew, an empirical one uses the observed: the diagonal is then that of
    these matrices. Source: George et al. (2018), arXiv:1806.03884, Sec. 3.

    Args:
        engine: The model and its likelihood.
        x: Batch that the model takes.
        y: Its labels.
        basis: Eigenvectors of each trainable tensor's factors.

    Returns:
        The summed loss, and for each tensor ``Σ (uᵀ J v)²`` over examples and columns of the output
        Hessian's root, in the form of `KronEigen.table`.

    Raises:
        ValueError: If labels lie outside the classes.
        FloatingPointError: If the loss or a diagonal is not finite; names the tensor.
    """
    loss, blocks = engine.root_blocks(x, y)
    diagonals = [basis.gram_diagonal(i, rows) for i, rows in enumerate(blocks)]
    totals = torch.stack([values.sum().to(diagonals[0].device) for values in diagonals])
    if not bool(totals.isfinite().all()):
        name = engine.blocks[int((~totals.isfinite()).nonzero()[0])].name
        raise FloatingPointError(f"the eigenvalues of {name!r} are not finite")
    return loss, diagonals
