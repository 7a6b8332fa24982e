"""Kronecker factors whose eigenvalues are corrected: the exact curvature's diagonal in their basis.

Source: George, Laurent, Bouthillier, Ballas, Vincent (2018), *Fast approximate natural gradient
descent in a Kronecker-factored eigenbasis*, arXiv:1806.03884.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from laplace_lora.curvature.kron_protocol import LowRankKron, LowRankKronDecomposed
from laplace_lora.linalg.eigen import DiagonalEigen


@dataclass(frozen=True)
class CorrectedKron:
    """Kronecker factors, and in their eigenbasis the diagonal of the exact curvature.

    Of all matrices with these eigenvectors it is the nearest to the exact block in Frobenius norm,
    so it is never farther than the factors' product. Where a side is low-rank, the directions left
    out share the mean of theirs, which keeps the trace of the exact block; with the residual
    ``"zero"`` they stay zero, as in the factors, and what they hold is dropped. Directions in which
    a side is zero up to rounding share their mean, too, as nothing tells which eigenvectors they
    have: sums over tokens, as *reduce* takes them, may be zero where the exact block is not.

    Attributes:
        factors: The factors; only their eigenvectors count.
        corrected: The eigenvectors with the exact diagonal; ``None`` before any data gave one.
    """

    factors: LowRankKron
    corrected: LowRankKronDecomposed | None = None

    def decompose(self) -> LowRankKronDecomposed:
        """Return the eigenvectors with the exact diagonal, zeros before any data gave one."""
        if self.corrected is not None:
            return self.corrected
        basis = self.factors.decompose()
        tables = [torch.zeros_like(basis.table(i)) for i in range(len(basis))]
        return basis.with_tables(tables)

    def add(self, basis: LowRankKronDecomposed, diagonals: list[Tensor]) -> CorrectedKron:
        """Return the same with a diagonal of further data.

        Args:
            basis: What `decompose` returned.
            diagonals: Diagonal of each block in this basis, in the form of its `table`.
        """
        diagonals = [_evened(basis, i, diagonal) for i, diagonal in enumerate(diagonals)]
        if self.factors.residual == "zero":
            diagonals = [_kept_only(basis, i, diagonal) for i, diagonal in enumerate(diagonals)]
        tables = [basis.table(i) + diagonal for i, diagonal in enumerate(diagonals)]
        return replace(self, corrected=basis.with_tables(tables))

    def joined(self, n: int, other: CorrectedKron, m: int) -> CorrectedKron:
        """Return the curvature of ``n`` examples together with that of ``m`` others.

        The factors add up and give a joint basis. There each diagonal becomes that of the block it
        stood for, ``(Q ∘ Q) e (R ∘ R)ᵀ`` with ``Q`` and ``R`` the old bases' coordinates in the
        new: what was off the diagonal in the old basis is not known any more, so the sum is the
        joint data's diagonal where bases agree, and has its trace everywhere (but for the residual
        ``"zero"``).
        """
        joint = CorrectedKron(self.factors.joined(n, other.factors, m))
        basis = joint.decompose()
        for part in (self, other):
            if part.corrected is not None:
                joint = joint.add(basis, part.corrected.diagonals_in(basis))
                basis = joint.decompose()
        return replace(joint, corrected=basis)

    def to(self, device: torch.device | str) -> CorrectedKron:
        """Return the curvature on another device."""
        corrected = None if self.corrected is None else self.corrected.to(device)
        return CorrectedKron(self.factors.to(device), corrected)


def _evened(basis: LowRankKronDecomposed, i: int, diagonal: Tensor) -> Tensor:
    """Return a block's diagonal with one value for all directions in which a side is zero."""
    evened = diagonal.clone()
    for side, rows in zip(basis.blocks[i], (evened, evened.T), strict=False):
        if isinstance(side, DiagonalEigen):  # whose eigenvectors are known
            continue
        values = side.values
        noise = torch.finfo(values.dtype).eps * math.sqrt(len(values)) * values.max()
        unknown = (values <= noise).nonzero().squeeze(1)
        if len(unknown):
            rows[unknown] = rows[unknown].mean(0)
    return evened


def _kept_only(basis: LowRankKronDecomposed, i: int, diagonal: Tensor) -> Tensor:
    """Return a block's diagonal with zeros for the directions that a side leaves out."""
    kept = torch.zeros_like(diagonal)
    rows, columns = (*(len(values) for values in basis.eigenvalues[i]), 1)[:2]
    kept[:rows, :columns] = diagonal[:rows, :columns]
    return kept
