"""Dense and diagonal sums of outer products, and their eigendecompositions.

A factor is filled by `update` and is linear in the data, so batches, loaders and processes merge by
addition. See `sketch` for low-rank factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_lora.linalg.eigen import DiagonalEigen, Eigen, check_finite, symmetric_eigen

RESIDUALS = ("isotropic", "zero")
SMALL = 64  # a side whose whole matrix is as quick to look at as its diagonal, which is strided

TILE = 128  # rows of the lower half that are computed at once

X = TypeVar("X")
Y = TypeVar("Y")


class DenseFactor:
    """A ``(d, d)`` sum of outer products.

    A processor computes the lower half of a long side only, in tiles; what stands above the
    diagonal is written when the matrix is read.

    Args:
        matrix: The sum so far, shape ``(d, d)``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self._sums = matrix
        self._is_half = False

    @property
    def matrix(self) -> Tensor:
        """The sum, ``(d, d)``."""
        if self._is_half:
            lower = self._sums.tril()
            torch.add(lower, lower.tril(-1).T, out=self._sums)
            self._is_half = False
        return self._sums

    @classmethod
    def zeros(cls, d: int, dtype: torch.dtype, device: torch.device | str) -> DenseFactor:
        """Return an empty sum of size ``d``."""
        return cls(torch.zeros(d, d, dtype=dtype, device=device))

    @classmethod
    def of(cls, eigen: Eigen) -> DenseFactor:
        """Return the matrix that has all these eigenpairs."""
        vectors = eigen.vectors.double()
        return cls((vectors * eigen.values.double() @ vectors.T).to(eigen.values.dtype))

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return self._sums.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return self._sums.dtype

    @property
    def trace(self) -> Tensor:
        """Trace of the sum, a scalar."""
        return self._sums.diagonal().sum()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self._sums.nbytes

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold the sum; adding these adds factors."""
        return [self.matrix]

    def update(self, rows: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add ``Σ_n weight_n row_n row_nᵀ`` in ``O(n d²)``.

        Args:
            rows: Inputs or output gradients of one map, shape ``(n, d)``.
            weight: Of all rows, or of each, ``(n,)``.
        """
        rows = rows.to(self.dtype)
        if isinstance(weight, Tensor):
            left, alpha = rows * weight.unsqueeze(1), 1.0
        else:
            left, alpha = rows, weight
        if rows.device.type != "cpu" or self.d <= TILE:
            self._sums.addmm_(left.T, rows, alpha=alpha)
            return
        self._is_half = True
        for start in range(0, self.d, TILE):
            end = min(start + TILE, self.d)
            self._sums[start:end, :end].addmm_(left[:, start:end].T, rows[:, :end], alpha=alpha)

    def witness(self) -> Tensor:
        """Return numbers of the sum that are not finite if rows were not."""
        return self._sums if self.d <= SMALL else self._sums.diagonal()

    def add(self, other: DenseFactor | DiagonalFactor | Tensor) -> DenseFactor:
        """Return the sum with a dense or diagonal factor, or with a ``(d, d)`` matrix."""
        return DenseFactor(self.matrix + (other if isinstance(other, Tensor) else other.matrix))

    def __mul__(self, scalar: float | Tensor) -> DenseFactor:
        return DenseFactor(scalar * self.matrix)

    __rmul__ = __mul__

    def to(self, device: torch.device | str) -> DenseFactor:
        """Return the factor on another device."""
        return DenseFactor(self.matrix.to(device))

    def decompose(self, residual: str = "isotropic") -> Eigen:
        """Eigendecompose in double precision; ``residual`` has no effect on a dense sum."""
        check_finite(self.matrix)
        values, vectors = symmetric_eigen(self.matrix.double())
        dtype = self.matrix.dtype
        values, vectors = values.clamp(min=0).to(dtype), vectors.to(dtype).contiguous()
        return Eigen(vectors, values, self.matrix.new_zeros(()))


def check_residual(residual: str) -> None:
    """Refuse any other treatment of the directions left out than `RESIDUALS`."""
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {RESIDUALS}, got {residual!r}")


def weighted_square_norm(rows: Tensor, weight: float | Tensor) -> Tensor:
    """Return ``Σ_n weight_n |row_n|²``, a float64 scalar.

    Args:
        rows: Shape ``(n, d)``.
        weight: Of all rows, or of each, ``(n,)``.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    # Row by row: single precision loses a thousandth of a sum over all entries at once.
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double()
    if isinstance(weight, Tensor):
        return (norms.square() * weight).sum()
    return torch.dot(norms, norms) * weight


def map_shared(blocks: list[list[X]], function: Callable[[X], Y]) -> list[list[Y]]:
    """Apply a function to every object of nested lists, only once to one that occurs repeatedly."""
    results = {id(x): function(x) for x in {id(x): x for block in blocks for x in block}.values()}
    return [[results[id(x)] for x in block] for block in blocks]


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
        """Dtype of the sums."""
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
        """The dense ``(d, d)`` matrix, for laplace-torch's `Kron`."""
        return self.sums.diag()

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold the sum; adding these adds factors."""
        return [self.sums]

    def update(self, rows: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add the diagonal of ``Σ_n weight_n row_n row_nᵀ`` in ``O(n d)``.

        Args:
            rows: One gradient per example, or unit vectors, shape ``(n, d)``.
            weight: Of all rows, or of each, ``(n,)``.
        """
        squares = rows.to(self.sums.dtype).square()
        if isinstance(weight, Tensor):
            squares *= weight.unsqueeze(1)
            weight = 1.0
        self.sums.add_(squares.sum(0), alpha=weight)

    def witness(self) -> Tensor:
        """Return numbers of the sum that are not finite if rows were not."""
        return self.sums

    def add(self, other: Any) -> Any:
        """Return the sum with another diagonal, or with that of a ``(d, d)`` matrix.

        With a factor of another kind, as earlier versions saved, it is of that kind.
        """
        if not isinstance(other, DiagonalFactor | Tensor):
            return other.add(self)
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
        """Return the diagonal as eigenvalues; ``residual`` has no effect."""
        check_finite(self.sums)
        return DiagonalEigen(self.sums)
