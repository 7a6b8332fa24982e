"""The exact curvature in the span of a few directions, and the evidence's gradient term there.

A trained adapter is no mode of the prior that is tuned later: the quadratic expansion of the log
joint at its weights has a linear term ``b = g − P₀ (θ − μ₀)`` with the gradient ``g`` of the log
likelihood, and the log evidence gains ``½ bᵀ P⁻¹ b``. The inverse of a block-diagonal curvature
must not be used there: all examples share the gradient's direction, along which Kronecker factors
are far too small, and the term would explode. In a subspace spanned by ``V`` the exact curvature
is affordable, and ``½ bᵀ V (Vᵀ P V)⁻¹ Vᵀ b`` is a lower bound of the term that rises with every
further direction. It is never taken without what the prior charges, ``−½ (θ − μ₀)ᵀ P₀ (θ − μ₀)``:
of large weights under a strong prior both are so large that only their rounding would be left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

INDEPENDENT = 1e-7  # share of a direction that the others must leave for it to count


@dataclass(frozen=True)
class Subspace:
    """Inner products of ``m`` directions with all that the gradient term needs; float64.

    Attributes:
        grams: Of each other, tensor by tensor, ``(tensors, m, m)``.
        curvature: ``Vᵀ H V`` with the exact curvature of the summed loss, ``(m, m)``.
        gradient: With the gradient of the summed loss, ``(m,)``.
        displacement: With ``θ − μ₀``, tensor by tensor, ``(tensors, m)``.
        prior_mean: ``μ₀``, one value or one per weight.
    """

    grams: Tensor
    curvature: Tensor
    gradient: Tensor
    displacement: Tensor
    prior_mean: Tensor

    @cached_property
    def basis(self) -> Tensor:
        """Coefficients of orthonormal directions, ``(m, independent directions)``."""
        gram = self.grams.sum(0)
        scale = gram.diagonal().clamp(min=1e-300).rsqrt()
        values, vectors = torch.linalg.eigh(scale.unsqueeze(1) * gram * scale)
        kept = values > INDEPENDENT * values[-1]
        return scale.unsqueeze(1) * vectors[:, kept] * values[kept].rsqrt()

    def rise(self, prior: Tensor, scale: float | Tensor) -> Tensor:
        """Return the lower bound of ``½ bᵀ P⁻¹ b``, less ``½ dᵀ P₀ d`` with ``d = θ − μ₀``.

        As ``d`` is in the span, the two combine: with the gradient ``g`` of the loss, its curvature
        ``H`` and ``b = −c g − P₀ d`` they are ``½ c [c gᵀ P⁻¹ g + (2 g − H d)ᵀ P⁻¹ P₀ d]``. Prior
        and ``c`` are those of `GradientTerm.rise`.
        """
        gradient, curvature, displacement = self._coordinates
        downhill, back = self._solved(prior, scale)
        slope = 2 * gradient - curvature @ displacement
        return 0.5 * scale * (gradient @ downhill + slope @ back)

    def solution(self, prior: Tensor, scale: float | Tensor) -> Tensor:
        """Return the coefficients of ``P⁻¹ b`` within the span, ``(m,)``; see `rise`."""
        return -self.basis @ sum(self._solved(prior, scale))

    @cached_property
    def _coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient, curvature and displacement in the orthonormal basis."""
        basis = self.basis
        curvature = basis.T @ self.curvature @ basis
        return basis.T @ self.gradient, curvature, basis.T @ self.displacement.sum(0)

    def _solved(self, prior: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return ``P⁻¹ c g`` and ``P⁻¹ P₀ d`` in the orthonormal basis."""
        gradient, curvature, displacement = self._coordinates
        precisions = prior.double().expand(len(self.grams)).to(self.grams.device)
        own = self.basis.T @ torch.einsum("t,tij->ij", precisions, self.grams) @ self.basis
        right = torch.stack([scale * gradient, own @ displacement], dim=1)
        downhill, back = torch.linalg.solve(scale * curvature + own, right).unbind(1)
        return downhill, back

    def to(self, device: torch.device) -> Subspace:
        """Return the same on another device."""
        return Subspace(*(getattr(self, field.name).to(device) for field in fields(self)))


SUBSPACE = "subspace."


def subspace_entries(subspace: Subspace) -> dict[str, Tensor]:
    """Return a subspace's tensors by name, in copies, as `subspace_from` takes them."""
    names = [field.name for field in fields(Subspace)]
    return {f"{SUBSPACE}{name}": getattr(subspace, name).clone() for name in names}


def subspace_from(tensors: Mapping[str, Any]) -> Subspace | None:
    """Return the subspace in saved tensors, ``None`` if there is none.

    Raises:
        KeyError: If some of its tensors are missing.
        ValueError: If their shapes do not go together.
    """
    if not any(name.startswith(SUBSPACE) for name in tensors):
        return None
    found = Subspace(*(tensors[f"{SUBSPACE}{field.name}"] for field in fields(Subspace)))
    found = replace(found, prior_mean=found.prior_mean.clone())  # the settings' may change in place
    count, m = found.displacement.shape
    shapes = found.grams.shape, found.curvature.shape, found.gradient.shape
    if shapes != ((count, m, m), (m, m), (m,)):
        raise ValueError(f"the subspace has tensors of shapes {shapes}")
    return found


def spanned(
    directions: Tensor, curvature: Tensor, gradient: Tensor, displacement: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the inner products of directions that a `Subspace` holds.

    Args:
        directions: Shape ``(m, parameters)``.
        curvature: ``Vᵀ H V``, ``(m, m)``.
        gradient: Of the summed loss, ``(parameters,)``.
        displacement: ``θ − μ₀``, ``(parameters,)``.
        sizes: Numbers in each tensor.
    """
    parts = list(directions.double().split(sizes, dim=1))
    offsets = displacement.double().split(sizes)
    return (
        torch.stack([V @ V.T for V in parts]),
        curvature.double(),
        directions.double() @ gradient.double(),
        torch.stack([V @ part for V, part in zip(parts, offsets, strict=True)]),
    )
