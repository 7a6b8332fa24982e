"""Sketched sums of outer products: low-rank factors that are still plain sums over the data."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.linalg.eigen import Eigen, check_finite
from laplace_lora.linalg.factors import DenseFactor, DiagonalFactor, weighted_square_norm
from laplace_lora.linalg.half_rows import BFLOAT16, product, split
from laplace_lora.linalg.nystrom import leading_eigenpairs
from laplace_lora.linalg.sketch_basis import PIECE, sketch_basis, sketch_basis_terms

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
        rows_dtype: Dtype of ``Ω`` and of the eigenvectors; the sketch's when ``None``. Sums in
            float64 of rows in float32 keep eigenvalues below the rounding of the largest.
    """

    def __init__(
        self, sketch: Tensor, trace: Tensor, rank: int, rows_dtype: torch.dtype | None = None
    ) -> None:
        self.sketch = sketch
        self.trace = trace
        self.rank = rank
        self.rows_dtype = sketch.dtype if rows_dtype is None else rows_dtype
        self._basis: dict[bool, Tensor] = {}  # held from the first rows to the decomposition

    @classmethod
    def zeros(
        cls,
        d: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device | str,
        rows_dtype: torch.dtype | None = None,
    ) -> LowRankFactor:
        """Return an empty sketch of a ``(d, d)`` sum.

        Raises:
            ValueError: If ``rank`` is not positive, or the sketch would be no smaller than the sum.
        """
        columns = sketch_columns(rank)
        if rank < 1 or columns >= d:
            raise ValueError(f"a sketch of rank {rank} needs 1 ≤ rank and {columns} < d, got d={d}")
        sketch = torch.zeros(d, columns, dtype=dtype, device=device)
        trace = torch.zeros((), dtype=torch.float64, device=device)
        return cls(sketch, trace, rank, rows_dtype)

    @classmethod
    def of(cls, eigen: Eigen, trace: Tensor, dtype: torch.dtype | None = None) -> LowRankFactor:
        """Return the sketch of a matrix of which the leading eigenpairs and the trace are known.

        The other directions share what is left of the trace evenly.

        Args:
            eigen: The eigenpairs; their residual has no effect.
            trace: Trace of the matrix, a float64 scalar.
            dtype: Dtype of the sketch; the eigenvectors' when ``None``.
        """
        (d, rank), vectors, values = eigen.vectors.shape, eigen.vectors, eigen.values.double()
        dtype = dtype or vectors.dtype
        factor = cls.zeros(d, rank, dtype, vectors.device, vectors.dtype)
        factor.trace = trace
        rest = (trace - values.sum()).clamp(min=0) / (d - rank)
        test, core = factor._last_test_matrix(), values.new_zeros(rank, factor.sketch.shape[1])
        pieces = [vectors.split(PIECE), test.split(PIECE), factor.sketch.split(PIECE)]
        for v, t, _ in zip(*pieces, strict=True):
            core.addmm_(v.double().T, t.double())
        core *= (values - rest).unsqueeze(1)
        for v, t, y in zip(*pieces, strict=True):
            y.copy_(v.double() @ core + rest * t.double())
        return factor

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
        """Bytes held, without ``Ω``, which all factors of the same size share meanwhile."""
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
            rows = rows.to(self.rows_dtype)
            projected = self._projected(rows)
        alpha = 1.0
        if isinstance(weight, Tensor):
            projected *= weight.unsqueeze(1)
        else:
            alpha = weight
        if is_half:
            padded = product(rows.T, split(projected))
            self.sketch.add_(padded[:, : self.sketch.shape[1]], alpha=alpha)
        else:
            for part, y in zip(self._pieces(rows, 1), self._pieces(self.sketch, 0), strict=True):
                y.addmm_(part.to(y.dtype).T, projected, alpha=alpha)
        self.trace += weighted_square_norm(rows, weight)

    def witness(self) -> Tensor:
        """Return numbers of the sum that are not finite if rows were not."""
        return self.trace

    def add(self, other: LowRankFactor | DiagonalFactor | Tensor) -> LowRankFactor:
        """Return the sum with a sketch of the same size, a diagonal, or a ``(d, d)`` matrix.

        Raises:
            ValueError: If the other sketch has another size or rank.
        """
        if isinstance(other, Tensor):
            trace = self.trace + other.diagonal().sum().double()
            return self._with(self.sketch + other @ self._test_matrix(), trace)
        if isinstance(other, DiagonalFactor):
            sketch = other.sums.unsqueeze(1) * self._last_test_matrix()
            return self._with(self.sketch + sketch, self.trace + other.trace.double())
        if other.sketch.shape != self.sketch.shape or other.rank != self.rank:
            raise ValueError(
                f"cannot add sketches of shapes {tuple(self.sketch.shape)} and "
                f"{tuple(other.sketch.shape)}, ranks {self.rank} and {other.rank}"
            )
        return self._with(self.sketch + other.sketch, self.trace + other.trace)

    def __mul__(self, scalar: float | Tensor) -> LowRankFactor:
        return self._with(scalar * self.sketch, scalar * self.trace)

    __rmul__ = __mul__

    def to(self, device: torch.device | str) -> LowRankFactor:
        """Return the factor on another device."""
        return self._with(self.sketch.to(device), self.trace.to(device))

    def decompose(self, residual: str = "isotropic") -> Eigen:
        """Return the ``rank`` leading eigenpairs of the sum, see `leading_eigenpairs`.

        Args:
            residual: ``"isotropic"`` spreads the trace that the eigenpairs miss evenly over the
                other directions, so the trace is exact; ``"zero"`` drops it, as Yang et al. (2024),
                arXiv:2308.13111, do.
        """
        check_finite(self.sketch)
        dtype = self.sketch.dtype
        values, vectors = leading_eigenpairs(self.sketch, self._last_test_matrix, self.rank)
        missing = (self.trace - values.sum()).clamp(min=0) / (self.d - self.rank)
        if residual == "zero":
            missing = torch.zeros_like(missing)
        return Eigen(vectors, values.to(dtype), missing.to(dtype))

    def _with(self, sketch: Tensor, trace: Tensor) -> LowRankFactor:
        return LowRankFactor(sketch, trace, self.rank, self.rows_dtype)

    def _projected(self, rows: Tensor) -> Tensor:
        """Return ``rows Ω``, ``(n, l)``, in the dtype of the sums."""
        total = self.sketch.new_zeros(len(rows), self.sketch.shape[1])
        pieces = self._pieces(rows, 1), self._pieces(self._test_matrix(), 0)
        for part, t in zip(*pieces, strict=True):
            total.addmm_(part.to(total.dtype), t.to(total.dtype))
        return total

    def _pieces(self, matrix: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Return a matrix in pieces, if it is to be widened; whole otherwise."""
        if self.rows_dtype == self.dtype:
            return (matrix,)
        pieces: tuple[Tensor, ...] = matrix.split(PIECE, dim)
        return pieces

    def _last_test_matrix(self) -> Tensor:
        """Return ``Ω``, no longer held here."""
        test = self._test_matrix()
        self._basis = {}
        return test

    def _test_matrix(self, in_terms: bool = False) -> Tensor:
        """Return ``Ω``, as two terms of bfloat16 if so asked."""
        if in_terms not in self._basis:
            (d, l), device = self.sketch.shape, self.sketch.device
            self._basis[in_terms] = (
                sketch_basis_terms(d, l, device)
                if in_terms
                else sketch_basis(d, l, self.rows_dtype, device)
            )
        return self._basis[in_terms]


Factor = DenseFactor | LowRankFactor | DiagonalFactor


def sketch_columns(rank: int) -> int:
    """Return the number of columns of a sketch that yields ``rank`` eigenpairs."""
    return 2 * rank + OVERSAMPLING
