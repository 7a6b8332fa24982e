"""`Diagonal`: one curvature per weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_lora.curvature import batch_curvature
from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.rounded import in_working_dtype
from laplace_lora.linalg.row_products import weighted_products
from laplace_lora.structures.base import Functions, Spectrum
from laplace_lora.structures.settings import expanded
from laplace_lora.structures.tensor_sum import TensorSum


@dataclass(frozen=True)
class DiagonalPrecision:
    """The diagonal matrix ``curvature + prior``.

    Attributes:
        curvature: Scaled curvature of each weight, ``(parameters,)``.
        prior: Prior precision of each weight.
        sizes: Numbers in each tensor.
    """

    curvature: Tensor
    prior: Tensor
    sizes: tuple[int, ...]

    @property
    def values(self) -> Tensor:
        """The diagonal, ``(parameters,)``."""
        return self.curvature + self.prior

    def covariance(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, see `Precision`."""
        variances = self.variance().split(self.sizes)
        rows = (jacobian.flatten(2) for jacobian in jacobians)
        forms = ((J * variance) @ J.mT for J, variance in zip(rows, variances, strict=True))
        return sum(forms, next(forms))

    def forms(
        self, jacobians: Iterable[Tensor], functions: Functions
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each tensor's part of ``J f(H) Jᵀ``, see `Precision`."""
        curvature = self.curvature.split(self.sizes)
        for i, jacobian in enumerate(jacobians):
            yield i, weighted_products(jacobian.flatten(2), curvature[i], partial(functions, i))

    def spectra(self) -> list[Spectrum]:
        """Return each tensor's curvature eigenvalues: its entries."""
        return [[(values, 1)] for values in self.curvature.split(self.sizes)]

    def root_multiply(self, noise: Tensor) -> Tensor:
        """Return ``P^-½ ε`` for ``ε`` of shape ``(n, parameters)``."""
        return noise * (1 / self.values.sqrt()).reshape(1, -1)

    def variance(self) -> Tensor:
        """Return the diagonal of ``P⁻¹``, ``(parameters,)``."""
        return 1 / self.values


@dataclass(frozen=True)
class Diagonal(TensorSum):
    """One curvature per weight, correlations left out."""

    not_finite: ClassVar[str] = "the diagonal curvature is not finite"

    advice = "set `modules` to cover fewer layers"

    def product(self, curvature: Tensor, rows: Tensor) -> Tensor:
        """Return the products of the diagonal with weight vectors, ``(n, parameters)``."""
        return rows * curvature

    def solve(self, curvature: Tensor, rows: Tensor, delta: float) -> Tensor:
        """Return ``(curvature + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        return rows / (curvature + delta)

    @property
    def shape(self) -> list[int]:
        """Shape of the curvature."""
        return [sum(self.sizes)]

    def add(
        self,
        engine: Engine,
        sums: Tensor | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's diagonal."""
        loss, diagonal = batch_curvature.diagonal(engine, *batch, gradient)
        return loss, diagonal if sums is None else sums + diagonal

    def unpack(self, engine: Engine, tensors: Mapping[str, Tensor], description: Any) -> Tensor:
        """Return a packed diagonal in the working dtype, see `TensorSum.unpack`."""
        return super().unpack(engine, in_working_dtype(tensors, engine.dtype), description)

    def precision(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> DiagonalPrecision:
        """Return ``scale · curvature + prior``."""
        return DiagonalPrecision(scale * curvature, expanded(prior, self.sizes), self.sizes)

    def log_det_ratio(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        return torch.log1p((scale * curvature / expanded(prior, self.sizes)).double()).sum()
