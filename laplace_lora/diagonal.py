"""Sums of squares, for what no Kronecker factor covers, and their trivial eigendecomposition.

A diagonal is exact where every row added is a whole example's gradient; nothing ``d × d`` is ever
formed. Sums of outer products live in `factors` and `sketch`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.factors import check_finite


@dataclass(frozen=True)
class DiagonalEigen:
    """A diagonal matrix in the protocol of `Eigen`: its eigenvectors are the unit vectors.

    Attributes:
        values: The diagonal, ``≥ 0``, shape ``(d,)``.
    """

    values: Tensor

    def to(self, device: torch.device | str) -> DiagonalEigen:
        """Return the diagonal on another device."""
        return DiagonalEigen(self.values.to(device))

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return len(self.values)

    @property
    def multiplicity(self) -> int:
        """Number of directions left out: none."""
        return 0

    @property
    def vectors(self) -> Tensor:
        """The unit vectors, ``(d, d)``; for tests, nothing else forms them."""
        return torch.eye(self.d, dtype=self.values.dtype, device=self.values.device)

    def parts(self) -> list[tuple[Tensor, int]]:
        """Return the eigenvalues, each of multiplicity one."""
        return [(self.values, 1)]

    def basis(self) -> list[Tensor]:
        """Return the tensors that say which directions the eigenvalues belong to: none."""
        return []

    def split(self, W: Tensor, dim: int) -> list[Tensor]:
        """Return ``W``, which has its coordinates already."""
        return [W]

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """Undo `split`."""
        return parts[0]

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Return values on the diagonal from values of the eigenvalues: the same."""
        return parts[0]

    def carried(self, other: Any, values: Tensor) -> Tensor:
        """Return what is diagonal here as it is there: unchanged."""
        return values


class DiagonalFactor:
    """The diagonal of a ``(d, d)`` sum of outer products.

    Args:
        sums: The diagonal so far, shape ``(d,)``.
    """

    def __init__(self, sums: Tensor) -> None:
        self.sums = sums

    @classmethod
    def zeros(cls, d: int, dtype: torch.dtype, device: torch.device | str) -> DiagonalFactor:
        """Return an empty sum of size ``d``."""
        return cls(torch.zeros(d, dtype=dtype, device=device))

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return len(self.sums)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the sums."""
        return self.sums.dtype

    @property
    def trace(self) -> Tensor:
        """Trace of the sum, a scalar."""
        return self.sums.sum()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.sums.nbytes

    @property
    def matrix(self) -> Tensor:
        """The dense ``(d, d)`` matrix, for laplace-torch's own `Kron`."""
        return self.sums.diag()

    def tensors(self) -> list[Tensor]:
        """Return what the sum consists of; adding these adds factors."""
        return [self.sums]

    def update(self, rows: Tensor, weight: float = 1.0) -> None:
        """Add ``weight`` times the diagonal of ``rowsᵀ rows`` in ``O(n d)``.

        Args:
            rows: Gradients of whole examples, shape ``(n, d)``.
            weight: Factor of the whole addend.
        """
        self.sums.add_(rows.to(self.sums.dtype).square().sum(0), alpha=weight)

    def add(self, other: DiagonalFactor | Tensor) -> DiagonalFactor:
        """Return the sum with another diagonal, or with that of a ``(d, d)`` matrix."""
        return DiagonalFactor(
            self.sums + (other.diagonal() if isinstance(other, Tensor) else other.sums)
        )

    def __mul__(self, scalar: float | Tensor) -> DiagonalFactor:
        return DiagonalFactor(scalar * self.sums)

    __rmul__ = __mul__

    def to(self, device: torch.device | str) -> DiagonalFactor:
        """Return the factor on another device."""
        return DiagonalFactor(self.sums.to(device))

    def decompose(self, residual: str = "isotropic") -> DiagonalEigen:
        """Return the diagonal as its eigenvalues; nothing is left out, so ``residual`` is moot."""
        check_finite(self.sums)
        return DiagonalEigen(self.sums)
