"""`RowCurvature`: a curvature ``Zᵀ Z`` held as its rows, ready for a posterior under any prior."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from laplace_lora.linalg.row_grams import gram_matrix
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.linalg.row_storage import RowStorage, by_tensor


@dataclass(frozen=True)
class RowCurvature:
    """Rows ``Z`` with ``Zᵀ Z`` the curvature, and their Gram matrix's eigenpairs.

    The eigenpairs are kept for a scalar prior and for one other ratio between the tensors' prior
    precisions, which takes one pass over the rows, without the model, when first used.

    Attributes:
        rows: The rows.
    """

    rows: RowStorage
    _eigen: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @torch.no_grad()
    def eigenpairs(self, pattern: Tensor) -> tuple[Tensor, Tensor]:
        """Return eigenpairs of ``Z R⁻¹ Zᵀ``, without those at the level of rounding errors.

        Args:
            pattern: ``R``: one value, one per tensor or one per weight.
        """
        place = "scalar" if len(pattern) == 1 else "latest"
        stored = self._eigen.get(place)
        tolerance = 4 * torch.finfo(self.rows.working_dtype).eps
        # A prior that was only scaled has the same pattern, up to rounding.
        if (
            stored is not None
            and stored[0].shape == pattern.shape
            and torch.allclose(stored[0], pattern, rtol=tolerance, atol=0)
        ):
            return stored[1], stored[2]
        n_params = sum(self.rows.sizes)
        gram = gram_matrix(self.rows, by_tensor(pattern, self.rows.sizes))
        values, vectors = torch.linalg.eigh(gram)
        real = values > len(values) * torch.finfo(values.dtype).eps * values[-1]
        values, vectors = values[real].flip(0), vectors[:, real].flip(1)
        # No more directions than weights, where rows outnumber them.
        self._eigen[place] = (pattern, values[:n_params], vectors[:, :n_params])
        return self._eigen[place][1:]

    def precision(self, prior: Tensor, scale: Tensor) -> RowPrecision:
        """Return ``scale · Zᵀ Z + prior``, never formed."""
        wide = prior.detach().double()
        pattern = wide / wide[0]
        values, vectors = self.eigenpairs(pattern)
        parts = by_tensor(pattern, self.rows.sizes)
        return RowPrecision(
            self.rows, parts, values, vectors, float(scale.detach()), float(wide[0])
        )

    def product(self, weights: Tensor) -> Tensor:
        """Return the curvature's products with weight vectors, ``(n, parameters)``."""
        return self.rows.lift(self.rows.project(weights))

    def solve(self, weights: Tensor, delta: float) -> Tensor:
        """Return ``(Zᵀ Z + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        prior, one = weights.new_tensor([delta]), weights.new_tensor(1.0)
        return self.precision(prior, one).solve(weights)

    def log_det_ratio(self, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        prior, scale = prior.double(), scale.double()
        if len(prior) == 1 or not prior.requires_grad:
            wide = prior.detach()
            values, _ = self.eigenpairs(wide / wide[0])
            return torch.log1p(scale * values / prior[0]).sum()
        gram = scale * gram_matrix(self.rows, by_tensor(prior, self.rows.sizes))
        eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        return 2 * torch.linalg.cholesky(eye + gram).diagonal().log().sum()
