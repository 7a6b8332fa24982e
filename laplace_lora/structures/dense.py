"""`Dense`: one matrix over all weights, for heads and other small sets of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_lora.capture.jacobians import side_by_side
from laplace_lora.curvature import batch_curvature
from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.structures.base import Gram, Spectrum
from laplace_lora.structures.settings import expanded
from laplace_lora.structures.tensor_sum import TensorSum


@dataclass(frozen=True)
class DensePrecision:
    """The dense matrix ``curvature + prior``.

    Attributes:
        curvature: Scaled curvature, ``(parameters, parameters)``.
        prior: Prior precision of each weight.
        tensors: Number of trainable tensors.
    """

    curvature: Tensor
    prior: Tensor
    tensors: int

    @cached_property
    def root(self) -> Tensor:
        """Lower triangular ``L`` with ``L Lᵀ = P⁻¹``: the flipped inverse Cholesky factor."""
        matrix = self.curvature + torch.diag(self.prior)
        factor = torch.linalg.cholesky(torch.flip(matrix, (-2, -1)))
        flipped = torch.flip(factor, (-2, -1)).mT
        eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
        return torch.linalg.solve_triangular(flipped, eye, upper=False)

    @cached_property
    def inverse(self) -> Tensor:
        """The posterior covariance, ``(parameters, parameters)``."""
        return self.root @ self.root.T

    @cached_property
    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues and eigenvectors of the scaled curvature."""
        values, vectors = torch.linalg.eigh(self.curvature.double())
        dtype = self.curvature.dtype
        return values.clamp(min=0).to(dtype), vectors.to(dtype)

    def covariance(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, see `Precision`."""
        rows = side_by_side(jacobians)
        return torch.einsum("ncp,pq,nkq->nck", rows, self.inverse, rows)

    def gram_blocks(self, jacobians: Iterable[Tensor]) -> Iterator[tuple[int, list[Gram]]]:
        """Yield ``J P⁻¹ Jᵀ`` as a function of a scalar ``δ``, as the first tensor's part."""
        values, vectors = self.eigenpairs
        rows = side_by_side(jacobians) @ vectors
        yield 0, [(values, rows.unsqueeze(2) * rows.unsqueeze(1))]

    def spectra(self) -> list[Spectrum]:
        """Return the whole matrix's eigenvalues with the first tensor, none with the others."""
        values, _ = self.eigenpairs
        return [[(values, 1)]] + [[(values.new_zeros(1), 0)]] * (self.tensors - 1)

    def root_multiply(self, noise: Tensor) -> Tensor:
        """Return ``L ε`` for ``ε`` of shape ``(n, parameters)``."""
        return noise @ self.root.T

    def variance(self) -> Tensor:
        """Return the diagonal of ``P⁻¹``, ``(parameters,)``."""
        return self.inverse.diagonal()


@dataclass(frozen=True)
class Dense(TensorSum):
    """One matrix over all weights; its prior is tuned as a scalar."""

    not_finite: ClassVar[str] = "the curvature of the last layer is not finite"

    advice = "use KronLoraLLLaplace or DiagLoraLLLaplace"
    scalar_only = True

    def product(self, curvature: Tensor, rows: Tensor) -> Tensor:
        """Return the products of the matrix with weight vectors, ``(n, parameters)``."""
        return rows @ curvature

    def solve(self, curvature: Tensor, rows: Tensor, delta: float) -> Tensor:
        """Return ``(curvature + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        eye = torch.eye(len(curvature), dtype=curvature.dtype, device=curvature.device)
        return torch.linalg.solve(curvature + delta * eye, rows.T).T

    @property
    def shape(self) -> list[int]:
        """Shape of the curvature."""
        return [sum(self.sizes)] * 2

    def pack(self, curvature: Tensor, exact: bool = True) -> tuple[dict[str, Tensor], Any]:
        """Return the matrix, or if not exact its lower triangle, with all digits, and its shape.

        The matrix is near enough to singular that rounding it to float16 could make it indefinite.
        """
        if exact:
            return super().pack(curvature)
        rows, columns = torch.tril_indices(*curvature.shape)
        return {"triangle": curvature[rows, columns]}, list(curvature.shape)

    def unpack(self, engine: Engine, tensors: Mapping[str, Tensor], description: Any) -> Tensor:
        """Return a packed matrix, see `TensorSum.unpack`."""
        if "triangle" not in tensors:
            return super().unpack(engine, tensors, description)
        (triangle,), (n, _) = tensors.values(), self.shape
        if triangle.shape != (n * (n + 1) // 2,):
            raise ValueError(f"the triangle has shape {tuple(triangle.shape)}")
        rows, columns = torch.tril_indices(n, n).to(triangle.device)
        curvature = triangle.new_zeros(n, n)
        curvature[rows, columns] = curvature[columns, rows] = triangle
        if bool((curvature.diagonal() < 0).any()):
            raise ValueError("the curvature has negative entries on its diagonal")
        return super().unpack(engine, {"matrix": curvature}, description)

    def of_batch(
        self, engine: Engine, x: Any, y: Tensor, gradient: LossGradient | None
    ) -> tuple[Tensor, Tensor]:
        """Return a batch's loss and matrix."""
        return batch_curvature.matrix(engine, x, y, gradient)

    def precision(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> DensePrecision:
        """Return ``scale · curvature + prior``."""
        return DensePrecision(scale * curvature, expanded(prior, self.sizes), len(self.sizes))

    def log_det_ratio(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        root = expanded(prior, self.sizes).double().rsqrt()
        ratio = scale.double() * root.unsqueeze(1) * curvature.double() * root
        return torch.logdet(ratio + torch.eye(len(root), dtype=root.dtype, device=root.device))
