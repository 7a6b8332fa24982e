"""`FactorSpec`: which Kronecker factors are dense, and which are sketched."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laplace_lora.linalg.factors import DenseFactor, check_residual
from laplace_lora.linalg.sketch import Factor, LowRankFactor, sketch_columns


@dataclass(frozen=True)
class FactorSpec:
    """Which Kronecker factors are low-rank, and what replaces the directions they leave out.

    Attributes:
        rank: Eigenpairs of a low-rank side; ``None`` keeps every side dense.
        threshold: Sides up to this length stay dense, and so do those that a sketch would not
            make smaller.
        residual: ``"isotropic"`` keeps a low-rank side's trace exact, ``"zero"`` drops what its
            eigenpairs miss.

    Raises:
        ValueError: If ``rank`` is not positive, or ``residual`` is unknown.
    """

    rank: int | None = None
    threshold: int = 512
    residual: str = "isotropic"

    def __post_init__(self) -> None:
        check_residual(self.residual)
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"factor_rank must be positive or None, got {self.rank}")

    def is_dense(self, d: int) -> bool:
        """Return whether a side of length ``d`` stays dense."""
        return self.rank is None or d <= self.threshold or sketch_columns(self.rank) >= d

    def empty(
        self,
        d: int,
        dtype: torch.dtype,
        device: torch.device | str,
        rows_dtype: torch.dtype | None = None,
    ) -> Factor:
        """Return an empty sum for a side of length ``d``.

        Args:
            d: Length of the side.
            dtype: Dtype of the sums, float32 or better.
            device: Where the sums live.
            rows_dtype: Dtype of the rows, if the sums are wider, see `LowRankFactor`.
        """
        if self.rank is None or self.is_dense(d):
            return DenseFactor.zeros(d, dtype, device)
        return LowRankFactor.zeros(d, self.rank, dtype, device, rows_dtype)
