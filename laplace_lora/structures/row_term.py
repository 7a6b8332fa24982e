"""The evidence's gradient term with the exact curvature of all weights together.

Where the curvature is ``Zᵀ Z`` and the loss's gradient lies in the span of the rows, as with every
exact root of the output Hessian, ``½ bᵀ P⁻¹ b`` needs no further pass and no bound: see `RowTerm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laplace_lora.linalg.row_grams import gram_matrix
from laplace_lora.linalg.row_storage import RowStorage, by_tensor

OUTSIDE = 1e-4  # share of the gradient's square that the rows may miss


@dataclass(frozen=True)
class RowTerm:
    """``½ bᵀ (c Zᵀ Z + D)⁻¹ b − ½ dᵀ D d`` with ``b = −c g − D d``, a function of the prior ``D``.

    Under a scalar prior ``δ``, with eigenvalues ``λ`` and orthonormal eigenvectors of ``Zᵀ Z`` and
    the coordinates ``g`` and ``d`` there, it is ``½ Σ [c² g² + c δ (2 g d − λ d²)] / (c λ + δ)``:
    what the rows do not see of ``d`` cancels. Under any other, with ``g = Zᵀ w``, ``z = Z d`` and
    ``K = Z D⁻¹ Zᵀ``, it is ``½ [c ‖w‖² − c (z − w)ᵀ (I + c K)⁻¹ (z − w)]``.

    Attributes:
        rows: ``Z``.
        values: Positive eigenvalues of ``Z Zᵀ``, ``(k,)``, float64.
        vectors: Their eigenvectors, ``(rows, k)``.
        gradient: ``g``, of the summed loss, ``(parameters,)``.
        displacement: ``d = θ − μ₀``, ``(parameters,)``.
    """

    rows: RowStorage
    values: Tensor
    vectors: Tensor
    gradient: Tensor
    displacement: Tensor

    @cached_property
    def _coordinates(self) -> tuple[Tensor, Tensor]:
        """Coordinates of gradient and displacement."""
        vectors = self.vectors / self.values.sqrt()
        return self._on_rows(self.gradient) @ vectors, self._projected @ vectors

    @cached_property
    def _projected(self) -> Tensor:
        return self._on_rows(self.displacement)

    @property
    def misfit(self) -> tuple[Tensor, Tensor]:
        """``z − w``, ``(rows,)``, and ``‖w‖²``, of which the term is under several precisions."""
        w = self.vectors @ (self._coordinates[0] / self.values.sqrt())
        return self._projected - w, w @ w

    @property
    def is_exact(self) -> bool:
        """Whether the rows see the gradient."""
        whole = self.gradient.double().square().sum()
        return bool(whole - self._coordinates[0].square().sum() <= OUTSIDE * whole)

    def rise(self, prior: Tensor, scale: float | Tensor) -> Tensor:
        """Return the gradient term less what the prior charges, see `GradientTerm`."""
        prior = prior.double().to(self.gradient.device)
        scale = torch.as_tensor(scale).double().to(prior)
        g, d = self._coordinates
        if len(prior) == 1:
            drawn = scale * prior * (2 * g * d - self.values * d.square())
            parts = ((scale * g).square() + drawn) / (scale * self.values + prior)
            return 0.5 * parts.sum()
        gap, square = self.misfit
        gram = gram_matrix(self.rows, by_tensor(prior, self.rows.sizes))
        core = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) + scale * gram
        return 0.5 * scale * (square - gap @ torch.linalg.solve(core, gap))

    def _on_rows(self, weights: Tensor) -> Tensor:
        """Return ``Z`` times a weight vector, ``(rows,)``, float64."""
        return self.rows.project(weights.double().to(self.rows.device).unsqueeze(0))[0]
