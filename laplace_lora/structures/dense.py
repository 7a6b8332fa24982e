"""`Dense`: one matrix over all weights, for heads and other small sets of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from laplace_lora.capture.jacobians import side_by_side
from laplace_lora.curvature import batch_curvature
from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.cholesky import shifted_cholesky
from laplace_lora.linalg.row_products import weighted_products
from laplace_lora.structures.base import Functions, Spectrum
from laplace_lora.structures.settings import expanded
from laplace_lora.structures.tensor_sum import TensorSum

DTYPES = (torch.float64, torch.float32)  # of files; those of earlier versions have the model's


@dataclass(frozen=True)
class DensePrecision:
    """The dense matrix ``P = H + δ R``, with ``H`` the scaled curvature and ``δ R`` the prior.

    ``P⁻¹ = U diag(1/(e + δ)) Uᵀ`` with ``e`` the eigenvalues of ``R^-½ H R^-½`` and ``U`` its
    eigenvectors times ``R^-½``. A softmax's curvature is singular, and what rounding makes of its
    zeros, of either sign, counts as zero, see `_positive`. In float64, as far as it is not handed
    out.

    Attributes:
        curvature: Scaled curvature, ``(parameters, parameters)``; its dtype says how it is rounded.
        prior: Prior precision of each weight; ``δ`` is the first.
        tensors: Number of trainable tensors.
    """

    curvature: Tensor
    prior: Tensor
    tensors: int

    @cached_property
    def root(self) -> Tensor:
        """Lower triangular ``L`` with ``L Lᵀ = P⁻¹``, float64."""
        return torch.linalg.cholesky(self.inverse)

    @cached_property
    def inverse(self) -> Tensor:
        """The posterior covariance, ``(parameters, parameters)``, float64."""
        if self.curvature.requires_grad or self.prior.requires_grad:
            # Eigenvectors of equal eigenvalues have no derivative.
            return torch.linalg.inv(self.curvature.double() + torch.diag(self.prior.double()))
        values, vectors = self.eigenpairs
        inverse = (vectors / (values + self.prior[0].double())) @ vectors.T
        return (inverse + inverse.T) / 2

    @cached_property
    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """The eigenvalues ``e`` and ``U``, float64."""
        root = (self.prior[0] / self.prior).double().sqrt()
        values, vectors = torch.linalg.eigh(root.unsqueeze(1) * self.curvature.double() * root)
        return _positive(values, self.curvature.dtype), root.unsqueeze(1) * vectors

    @property
    def eigenvalues(self) -> Tensor:
        """The positive eigenvalues ``e``, ``(k,)``, float64."""
        values, _ = self.eigenpairs
        return values[values > 0]

    def coordinates(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J U`` for these eigenvalues, ``(batch, outputs, k)`` in float64."""
        values, vectors = self.eigenpairs
        return side_by_side(jacobians).double() @ vectors[:, values > 0]

    def covariance(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, see `Precision`."""
        rows = side_by_side(jacobians)
        wide = rows.double()
        return (wide @ self.inverse @ wide.mT).to(rows.dtype)

    def forms(
        self, jacobians: Iterable[Tensor], functions: Functions
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield ``J f(H) Jᵀ`` as the first tensor's part, see `Precision`."""
        values, vectors = self.eigenpairs
        rows = side_by_side(jacobians)
        onto = (rows.double() @ vectors).to(rows.dtype)
        yield 0, weighted_products(onto, values.to(rows.dtype), partial(functions, 0))

    def spectra(self) -> list[Spectrum]:
        """Return the whole matrix's ``e`` with the first tensor, none with the others."""
        values, _ = self.eigenpairs
        return [[(values, 1)]] + [[(values.new_zeros(1), 0)]] * (self.tensors - 1)

    def root_multiply(self, noise: Tensor) -> Tensor:
        """Return ``L ε`` for ``ε`` of shape ``(n, parameters)``."""
        return noise @ self.root.T.to(noise.dtype)

    def variance(self) -> Tensor:
        """Return the diagonal of ``P⁻¹``, ``(parameters,)``."""
        return self.inverse.diagonal().to(self.prior.dtype)


@dataclass(frozen=True)
class Dense(TensorSum):
    """One matrix over all weights; its prior is tuned as a scalar.

    It is summed and kept in float64, whatever the model's dtype: a large noise precision or large
    features put eigenvalues that are far above the prior's below the rounding of the largest. In
    files of earlier versions it has the model's dtype, which it keeps.
    """

    not_finite: ClassVar[str] = "the curvature of the last layer is not finite"

    advice = "use KronLoraLLLaplace or DiagLoraLLLaplace"
    scalar_only = True
    sums_over_examples = True

    def product(self, curvature: Tensor, rows: Tensor) -> Tensor:
        """Return the products of the matrix with weight vectors, ``(n, parameters)``."""
        return (rows.double() @ curvature.double()).to(rows.dtype)

    def solve(self, curvature: Tensor, rows: Tensor, delta: float) -> Tensor:
        """Return ``(curvature + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        matrix = curvature.double() + delta * torch.eye(len(curvature)).to(curvature.device)
        root = shifted_cholesky(matrix)  # a file of an earlier version may be indefinite
        return torch.cholesky_solve(rows.double().T, root).T.to(rows.dtype)

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
        """Return a packed matrix in the dtype that it has there, see `TensorSum.unpack`."""
        if any(tensor.dtype not in DTYPES for tensor in tensors.values()):
            raise ValueError(f"the curvature is none of {DTYPES}")
        if "triangle" not in tensors:
            return super().unpack(engine, tensors, description)
        (triangle,), (n, _) = tensors.values(), self.shape
        if triangle.shape != (n * (n + 1) // 2,):
            raise ValueError(f"the triangle has shape {tuple(triangle.shape)}")
        rows, columns = torch.tril_indices(n, n).to(triangle.device)
        curvature = triangle.new_zeros(n, n)
        curvature[rows, columns] = curvature[columns, rows] = triangle
        return super().unpack(engine, {"matrix": curvature}, description)

    def add(
        self,
        engine: Engine,
        sums: Tensor | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's matrix, in float64."""
        loss, rows = batch_curvature.rows(engine, *batch, gradient)
        wide = rows.double()
        if sums is None:
            sums = wide.new_zeros(self.shape)
        return loss, sums.addmm_(wide.T, wide)

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the matrix's bytes."""
        return torch.float64.itemsize * sum(self.sizes) ** 2

    def merge(self, raw: Tensor, n: int, other: Tensor, m: int) -> Tensor:
        """Return the sum of two matrices, in the dtype of the one that was rounded more."""
        return (raw + other).to(min(raw.dtype, other.dtype, key=lambda dtype: dtype.itemsize))

    def precision(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> DensePrecision:
        """Return ``scale · curvature + prior``."""
        return DensePrecision(scale * curvature, expanded(prior, self.sizes), len(self.sizes))

    def log_det_ratio(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        root = expanded(prior, self.sizes).double().rsqrt()
        ratio = scale.double() * root.unsqueeze(1) * curvature.double() * root
        values = _positive(torch.linalg.eigvalsh(ratio), curvature.dtype)
        return torch.log1p(values).sum()


def _positive(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return eigenvalues of a sum in a dtype, zero where they are no more than its rounding."""
    rounding = len(values) ** 0.5 * torch.finfo(dtype).eps * values.detach().max()
    return values.where(values > rounding, values.new_zeros(()))
