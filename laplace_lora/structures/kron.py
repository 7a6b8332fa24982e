"""`Kron`: Kronecker factors per tensor, with their own or with corrected eigenvalues."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature.batch_curvature import add_factors, assembled
from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.kfac import KfacSums
from laplace_lora.curvature.kron_protocol import LowRankKron, LowRankKronDecomposed
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.finite import check_diagonal
from laplace_lora.linalg.packing import TABLE, diagonal_blocks, pack_kron, unpack_kron
from laplace_lora.linalg.rounded import in_working_dtype
from laplace_lora.structures.base import Structure
from laplace_lora.structures.eigenvalue_correction import CorrectedKron
from laplace_lora.structures.sizes import kron_size, table_size

RawKron = LowRankKron | CorrectedKron


@dataclass(frozen=True)
class KronCurvature:
    """Kronecker factors with the eigendecomposition that a posterior uses.

    Attributes:
        factors: The factors.
        eigen: Their eigenvectors, with their own or with corrected eigenvalues.
    """

    factors: LowRankKron
    eigen: LowRankKronDecomposed


@dataclass(frozen=True)
class Kron(Structure[KfacSums, RawKron, KronCurvature]):
    """Kronecker factors per tensor.

    Attributes:
        spec: Which sides are low-rank.
        eigenvalue_correction: Whether the exact curvature's diagonal in the factors' eigenbasis
            takes the place of their eigenvalues, see `CorrectedKron`.
    """

    spec: FactorSpec
    eigenvalue_correction: bool = False

    advice = "lower `factor_rank`, set `modules` to cover fewer layers, or use DiagLoraLaplace"

    @property
    def has_second_pass(self) -> bool:
        """Whether eigenvalues are corrected."""
        return self.eigenvalue_correction

    @property
    def fits_by_jacobians(self) -> bool:
        """Whether eigenvalues are corrected."""
        return self.eigenvalue_correction

    def product(self, curvature: KronCurvature, rows: Tensor) -> Tensor:
        """Return the products of the factors with weight vectors, ``(n, parameters)``."""
        return curvature.eigen.bmm(rows, exponent=1)

    def solve(self, curvature: KronCurvature, rows: Tensor, delta: float) -> Tensor:
        """Return ``(curvature + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        return (curvature.eigen + rows.new_tensor([delta])).bmm(rows)

    def bound(self, engine: Engine) -> Kron:
        """Return the structure itself: factors know their sizes."""
        return self

    def add(
        self,
        engine: Engine,
        sums: KfacSums | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, KfacSums]:
        """Add a batch to the K-FAC sums, see `add_factors`."""
        return add_factors(engine, *batch, self.spec, sums, gradient)

    def tensors(self, sums: KfacSums) -> list[Tensor]:
        """Return the tensors that the sums consist of."""
        return sums.tensors()

    def finish(self, engine: Engine, sums: KfacSums, n: int) -> RawKron:
        """Return the factors over ``n`` examples."""
        factors = assembled(engine, sums, n, self.spec.residual)
        return CorrectedKron(factors) if self.eigenvalue_correction else factors

    def merge(self, raw: Any, n: int, other: Any, m: int) -> RawKron:
        """Return the factors of ``n`` examples together with those of ``m`` others."""
        joined: RawKron = raw.joined(n, other, m)
        return joined

    def ready(self, engine: Engine, raw: RawKron) -> KronCurvature:
        """Eigendecompose the factors.

        Raises:
            ValueError: If eigenvalues are corrected, and should not be, or the other way round, or
                a factor has negative entries on its diagonal.
            FloatingPointError: If a factor is not finite.
        """
        if isinstance(raw, CorrectedKron) != self.eigenvalue_correction:
            raise ValueError(
                "a curvature must be a CorrectedKron if, and only if, eigenvalue_correction is set"
            )
        factors = raw.factors if isinstance(raw, CorrectedKron) else raw
        for factor in factors.factors():
            check_diagonal(factor.tensors()[-1])  # of a sketch: its trace
        return KronCurvature(factors, raw.decompose())

    def raw(self, curvature: KronCurvature) -> RawKron:
        """Return the factors, with corrected eigenvalues if any."""
        if self.eigenvalue_correction:
            return CorrectedKron(curvature.factors, curvature.eigen)
        return curvature.factors

    def precision(
        self, curvature: KronCurvature, prior: Tensor, scale: Tensor
    ) -> LowRankKronDecomposed:
        """Return ``scale · curvature + prior``."""
        return curvature.eigen * scale + prior

    def log_det_ratio(self, curvature: KronCurvature, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        return self.precision(curvature, prior, scale).log_det_ratio()

    def pack(self, curvature: KronCurvature, exact: bool = True) -> tuple[dict[str, Tensor], Any]:
        """Return factors and eigenpairs as tensors, see `pack_kron`."""
        return pack_kron(curvature.factors, curvature.eigen, exact)

    def unpack(
        self, engine: Engine, tensors: Mapping[str, Tensor], description: Any
    ) -> KronCurvature:
        """Return packed factors and eigenpairs, see `unpack_kron`."""
        has_tables = any(name.startswith(f"{TABLE}.") for name in tensors)
        if has_tables != self.eigenvalue_correction:
            raise ValueError("the state is of another eigenvalue_correction than this posterior's")
        if engine.recording.uncovered == "diag":
            # Which maps Kronecker factors cannot express showed when the posterior was fitted.
            diagonal = diagonal_blocks(tensors, description)
            shown = [b.map for i, b in enumerate(engine.blocks) if i in diagonal]
            engine.recording.cover_whole([i for i in shown if not engine.maps[i].is_diagonal])
        kfacs, eigen = unpack_kron(
            in_working_dtype(tensors, engine.dtype),
            description,
            engine.sides,
            _diagonal_sides(engine),
            self.spec,
            self.eigenvalue_correction,
        )
        decomposed = LowRankKronDecomposed(eigen.blocks, tables=eigen.tables)
        return KronCurvature(LowRankKron(kfacs, self.spec.residual), decomposed)

    def to(self, curvature: KronCurvature, device: torch.device) -> KronCurvature:
        """Return the factors and eigenpairs on another device."""
        return KronCurvature(curvature.factors.to(device), curvature.eigen.to(device))

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the bytes of the factors and their eigenpairs, none of them shared."""
        sides, diagonal, tables = [], 0, 0
        for linear in engine.maps:
            p, q = linear.out_features, linear.in_features
            if linear.is_diagonal:
                diagonal += p
            elif engine.rows.have_diagonal_sum(linear):
                diagonal += q
                sides.append([p])
            else:
                sides.append([q, p])
        if self.eigenvalue_correction:
            tables = table_size(engine.sides, self.spec, _diagonal_sides(engine))
        return engine.dtype.itemsize * (diagonal + kron_size(sides, self.spec) + tables)

    def check_prior(self, length: int, n_layers: int, n_params: int) -> None:
        """Refuse a prior precision per weight, which has other eigenvectors than the factors.

        Raises:
            ValueError: If there are neither one nor one per tensor.
        """
        if length not in (1, n_layers):
            raise ValueError(
                f"Prior precision for Kron either scalar or per-layer: one value or {n_layers}, "
                f"got {length}; a DiagLoraLaplace can have one per weight"
            )

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments that describe the factors."""
        return {
            "factor_rank": self.spec.rank,
            "low_rank_threshold": self.spec.threshold,
            "residual": self.spec.residual,
            "eigenvalue_correction": self.eigenvalue_correction,
        }


def _diagonal_sides(engine: Engine) -> list[list[bool | None]]:
    """Return for the sides of each block whether they are diagonals; ``None`` where one may be."""
    kinds: list[list[bool | None]] = []
    for block, sides in zip(engine.blocks, engine.sides, strict=True):
        linear = engine.maps[block.map]
        may_be = len(sides) == 2 and engine.rows.have_diagonal_sum(linear)
        kinds.append([False, None] if may_be else [linear.is_diagonal] * len(sides))
    return kinds
