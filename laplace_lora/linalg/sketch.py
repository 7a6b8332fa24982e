"""Sketched sums of outer products: low-rank factors that are still plain sums over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.linalg.eigen import Eigen, check_finite
from laplace_lora.linalg.factors import DenseFactor, DiagonalFactor, weighted_square_norm
from laplace_lora.linalg.half_rows import BFLOAT16, product, split
from laplace_lora.linalg.nystrom import leading_eigenpairs
from laplace_lora.linalg.sketch_basis import sketch_basis, sketch_basis_terms

OVERSAMPLING = 10


class LowRankFactor:
    """A sketch ``Y = F Ω`` of a ``(d, d)`` sum of outer products ``F``, with its exact trace.

    ``Ω`` is fixed, ``(d, l)`` with ``l = 2 rank + 10`` orthonormal columns that depend on ``d`` and
    ``l`` alone, so sketches made anywhere add up. Source: Tropp, Yurtsever, Udell, Cevher (2017),
    *Fixed-rank approximation of a positive-semidefinite matrix from streaming data*,
    arXiv:1706.05736.

    Args:
        sketch: ``F Ω`` so far, shape ``(d, l)``.
        trace: Trace of ``F`` so far, a float64 scalar.
        rank: Number of eigenpairs of the decomposition.
    """

    def __init__(self, sketch: Tensor, trace: Tensor, rank: int) -> None:
        self.sketch = sketch
        self.trace = trace
        self.rank = rank
        self._basis: dict[bool, Tensor] = {}  # held from the first rows to the decomposition

    @classmethod
    def zeros(
        cls, d: int, rank: int, dtype: torch.dtype, device: torch.device | str
    ) -> LowRankFactor:
        """Return an empty sketch of a ``(d, d)`` sum.

        Raises:
            ValueError: If ``rank`` is not positive, or the sketch would be no smaller than the sum.
        """
        columns = sketch_columns(rank)
        if rank < 1 or columns >= d:
            raise ValueError(f"a sketch of rank {rank} needs 1 ≤ rank and {columns} < d, got d={d}")
        sketch = torch.zeros(d, columns, dtype=dtype, device=device)
        return cls(sketch, torch.zeros((), dtype=torch.float64, device=device), rank)

    @classmethod
    def of(cls, eigen: Eigen, trace: Tensor) -> LowRankFactor:
        """Return the sketch of a matrix of which the leading eigenpairs and the trace are known.

        The other directions share what is left of the trace evenly.

        Args:
            eigen: The eigenpairs; their residual has no effect.
            trace: Trace of the matrix, a float64 scalar.
        """
        d, rank = eigen.vectors.shape
        vectors, values = eigen.vectors.double(), eigen.values.double()
        test = sketch_basis(d, sketch_columns(rank), torch.float64, vectors.device)
        rest = (trace - values.sum()).clamp(min=0) / (d - rank)
        sketch = vectors @ ((values - rest).unsqueeze(1) * (vectors.T @ test)) + rest * test
        return cls(sketch.to(eigen.values.dtype), trace, rank)

    @property
    def d(self) -> int:
        """Side length of the sketched matrix."""
        return self.sketch.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the sums."""
        return self.sketch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes held, without ``Ω``, which all factors of the same size share for a while."""
        return self.sketch.nbytes + self.trace.nbytes

    def tensors(self) -> list[Tensor]:
        """Return the tensors that hold the sketch; adding these adds sketches."""
        return [self.sketch, self.trace]

    def update(self, rows: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add ``Σ_n weight_n row_n row_nᵀ`` without forming it.

        Accumulates ``Y += rowsᵀ (weight · rows Ω)`` in ``O(n d l)``.

        Args:
            rows: Inputs or output gradients of one map, shape ``(n, d)``.
            weight: Of all rows, or of each, ``(n,)``.
        """
        # Tensor cores take rows of bfloat16 as they are; elsewhere wider ones are faster.
        is_half = rows.is_cuda and rows.dtype == BFLOAT16 and self.sketch.dtype == torch.float32
        if is_half:
            projected = product(rows, self._test_matrix(in_terms=True))
        else:
            rows = rows.to(self.sketch.dtype)
            projected = rows @ self._test_matrix()
        alpha = 1.0
        if isinstance(weight, Tensor):
            projected *= weight.unsqueeze(1)
        else:
            alpha = weight
        if is_half:
            padded = product(rows.T, split(projected))
            self.sketch.add_(padded[:, : self.sketch.shape[1]], alpha=alpha)
        else:
            self.sketch.addmm_(rows.T, projected, alpha=alpha)
        self.trace += weighted_square_norm(rows, weight)

    def witness(self) -> Tensor:
        """Return numbers of the sum that are not finite if rows were not."""
        return self.trace

    def add(self, other: LowRankFactor | Tensor) -> LowRankFactor:
        """Return the sum with another sketch of the same size, or with a ``(d, d)`` matrix.

        Raises:
            ValueError: If the other sketch has another size or rank.
        """
        if isinstance(other, Tensor):
            trace = self.trace + other.diagonal().sum().double()
            return LowRankFactor(self.sketch + other @ self._test_matrix(), trace, self.rank)
        if other.sketch.shape != self.sketch.shape or other.rank != self.rank:
            raise ValueError(
                f"cannot add sketches of shapes {tuple(self.sketch.shape)} and "
                f"{tuple(other.sketch.shape)}, ranks {self.rank} and {other.rank}"
            )
        return LowRankFactor(self.sketch + other.sketch, self.trace + other.trace, self.rank)

    def __mul__(self, scalar: float | Tensor) -> LowRankFactor:
        return LowRankFactor(scalar * self.sketch, scalar * self.trace, self.rank)

    __rmul__ = __mul__

    def to(self, device: torch.device | str) -> LowRankFactor:
        """Return the factor on another device."""
        return LowRankFactor(self.sketch.to(device), self.trace.to(device), self.rank)

    def decompose(self, residual: str = "isotropic") -> Eigen:
        """Return the ``rank`` leading eigenpairs of the sum, see `leading_eigenpairs`.

        Args:
            residual: ``"isotropic"`` spreads the trace that the eigenpairs miss evenly over the
                other directions, so the trace is exact; ``"zero"`` drops it, as Yang et al. (2024),
                arXiv:2308.13111, do.
        """
        check_finite(self.sketch)
        dtype, test = self.sketch.dtype, self._test_matrix()
        self._basis = {}
        values, vectors = leading_eigenpairs(self.sketch, test, self.rank)
        missing = (self.trace - values.sum()).clamp(min=0) / (self.d - self.rank)
        if residual == "zero":
            missing = torch.zeros_like(missing)
        return Eigen(vectors, values.to(dtype), missing.to(dtype))

    def _test_matrix(self, in_terms: bool = False) -> Tensor:
        """Return ``Ω``, as two terms of bfloat16 if so asked."""
        if in_terms not in self._basis:
            (d, l), device = self.sketch.shape, self.sketch.device
            self._basis[in_terms] = (
                sketch_basis_terms(d, l, device)
                if in_terms
                else sketch_basis(d, l, self.sketch.dtype, device)
            )
        return self._basis[in_terms]


Factor = DenseFactor | LowRankFactor | DiagonalFactor


def sketch_columns(rank: int) -> int:
    """Return the number of columns of a sketch that yields ``rank`` eigenpairs."""
    return 2 * rank + OVERSAMPLING
