"""Dense sums of outer products, and the eigendecomposition that every factor ends in.

A factor is filled by `update`, is linear in what it was given (so that batches, loaders and
processes merge by addition) and ends in `decompose`. Sketched sums live in `sketch`; neither knows
layers or likelihoods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

RESIDUALS = ("isotropic", "zero")

X = TypeVar("X")
Y = TypeVar("Y")


@dataclass(frozen=True)
class Eigen:
    """One side's eigendecomposition ``U diag(λ) Uᵀ + ρ (I − U Uᵀ)``.

    Attributes:
        vectors: Orthonormal ``U``, shape ``(d, k)``, contiguous: a file restores them so, and
            products round by layout.
        values: ``λ ≥ 0``, shape ``(k,)``, in no particular order.
        residual: ``ρ ≥ 0``, a scalar; the eigenvalue of the ``d − k`` directions left out.
    """

    vectors: Tensor
    values: Tensor
    residual: Tensor

    def to(self, device: torch.device | str) -> Eigen:
        """Return the eigendecomposition on another device."""
        return Eigen(self.vectors.to(device), self.values.to(device), self.residual.to(device))

    @property
    def multiplicity(self) -> int:
        """Number of directions left out, ``d − k``."""
        return self.vectors.shape[0] - self.vectors.shape[1]

    def parts(self) -> list[tuple[Tensor, int]]:
        """Return eigenvalues with the multiplicity of each: the kept, then the residual."""
        kept = [(self.values, 1)]
        return [*kept, (self.residual.reshape(1), self.multiplicity)] if self.multiplicity else kept

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return self.vectors.shape[0]

    def basis(self) -> list[Tensor]:
        """Return the tensors that say which directions the eigenvalues belong to."""
        return [self.vectors]

    def split(self, W: Tensor, dim: int) -> list[Tensor]:
        """Return coordinates of ``W`` for each of the `parts`: on ``U``, and what ``U`` misses.

        Args:
            W: Any tensor whose dimension ``dim`` has length ``d``.
            dim: Either -2 or -1.
        """
        U = self.vectors
        kept = U.T @ W if dim == -2 else W @ U
        if not self.multiplicity:
            return [kept]
        # Subtracting the projection, not its square norm, keeps the rest accurate when it is small.
        return [kept, W - (U @ kept if dim == -2 else kept @ U.T)]

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """Return the tensor whose coordinates `split` gives."""
        kept = self.vectors @ parts[0] if dim == -2 else parts[0] @ self.vectors.T
        return kept + parts[1] if len(parts) == 2 else kept

    def spread(self, parts: list[Tensor]) -> Tensor:
        """Return the diagonal of a matrix with these eigenvectors.

        Args:
            parts: Its eigenvalues for each of `parts`, ``(k, n)`` and ``(1, n)``, ``n`` at once.

        Returns:
            Shape ``(d, n)``.
        """
        squares = self.vectors.square()
        kept = squares @ parts[0]
        if not self.multiplicity:
            return kept
        return kept + (1 - squares.sum(1, keepdim=True)).clamp(min=0) @ parts[1]

    def carried(self, other: Any, values: Tensor) -> Tensor:
        """Return the diagonal, in this basis, of what is diagonal in another one.

        Directions left out share the mean of theirs.

        Args:
            other: A basis of the same space.
            values: Eigenvalues in the other's `parts`, ``(n, …)``, float64.

        Returns:
            One row for each eigenvalue of this basis' `parts`.
        """
        squares = (self.vectors.double().T @ other.vectors.double()).square()
        counts = squares.new_ones(squares.shape[1])
        if other.multiplicity:
            missed = (1 - squares.sum(1, keepdim=True)).clamp(min=0)
            squares = torch.cat([squares, missed], dim=1)
            counts = torch.cat([counts, counts.new_full((1,), other.multiplicity)])
        if not self.multiplicity:
            return squares @ values
        rest = (counts - squares.sum(0)).clamp(min=0) / self.multiplicity
        return torch.cat([squares, rest.unsqueeze(0)]) @ values


class DenseFactor:
    """A ``(d, d)`` sum of outer products.

    Args:
        matrix: The sum so far, shape ``(d, d)``.
    """

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    @classmethod
    def zeros(cls, d: int, dtype: torch.dtype, device: torch.device | str) -> DenseFactor:
        """Return an empty sum of size ``d``."""
        return cls(torch.zeros(d, d, dtype=dtype, device=device))

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return self.matrix.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the sums."""
        return self.matrix.dtype

    @property
    def trace(self) -> Tensor:
        """Trace of the sum, a scalar."""
        return self.matrix.diagonal().sum()

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.matrix.nbytes

    def tensors(self) -> list[Tensor]:
        """Return what the sum consists of; adding these adds factors."""
        return [self.matrix]

    def update(self, rows: Tensor, weight: float = 1.0) -> None:
        """Add ``weight · rowsᵀ rows`` in ``O(n d²)``.

        Args:
            rows: Inputs or output gradients of one map, shape ``(n, d)``.
            weight: Factor of the whole addend.
        """
        rows = rows.to(self.matrix.dtype)
        self.matrix.addmm_(rows.T, rows, alpha=weight)

    def add(self, other: DenseFactor | Tensor) -> DenseFactor:
        """Return the sum with another factor, or with a ``(d, d)`` matrix."""
        return DenseFactor(self.matrix + (other if isinstance(other, Tensor) else other.matrix))

    def __mul__(self, scalar: float | Tensor) -> DenseFactor:
        return DenseFactor(scalar * self.matrix)

    __rmul__ = __mul__

    def to(self, device: torch.device | str) -> DenseFactor:
        """Return the factor on another device."""
        return DenseFactor(self.matrix.to(device))

    def decompose(self, residual: str = "isotropic") -> Eigen:
        """Eigendecompose in double precision; nothing is left out, so ``residual`` is moot."""
        check_finite(self.matrix)
        values, vectors = torch.linalg.eigh(self.matrix.double())
        dtype = self.matrix.dtype
        values, vectors = values.clamp(min=0).to(dtype), vectors.to(dtype).contiguous()
        return Eigen(vectors, values, self.matrix.new_zeros(()))


def check_residual(residual: str) -> None:
    """Refuse what is not one of the two ways to treat the directions left out."""
    if residual not in RESIDUALS:
        raise ValueError(f"residual must be one of {RESIDUALS}, got {residual!r}")


def check_finite(tensor: Tensor) -> None:
    """Refuse sums that are not finite.

    Raises:
        FloatingPointError: If any value is infinite or not a number.
    """
    if not tensor.isfinite().all():
        raise FloatingPointError("a curvature factor holds values that are not finite")


def map_shared(blocks: list[list[X]], function: Callable[[X], Y]) -> list[list[Y]]:
    """Apply a function to every object of nested lists, once to one that stands there twice."""
    results = {id(x): function(x) for x in {id(x): x for block in blocks for x in block}.values()}
    return [[results[id(x)] for x in block] for block in blocks]
