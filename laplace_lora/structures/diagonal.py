"""`Diagonal`: one curvature per weight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature import batch_curvature
from laplace_lora.curvature.engine import Engine
from laplace_lora.structures.base import Gram, Spectrum
from laplace_lora.structures.packed_tensor import pack_tensor, unpack_tensor
from laplace_lora.structures.state import expanded


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
        total: Any = 0.0
        for i, jacobian in enumerate(jacobians):
            rows = jacobian.flatten(2)
            total = total + (rows * variances[i]) @ rows.mT
        result: Tensor = total
        return result

    def gram_blocks(self, jacobians: Iterable[Tensor]) -> Iterator[tuple[int, list[Gram]]]:
        """Yield each tensor's part of ``J P⁻¹ Jᵀ`` as a function of ``δ``, see `Precision`."""
        curvature = self.curvature.split(self.sizes)
        for i, jacobian in enumerate(jacobians):
            rows = jacobian.flatten(2)
            yield i, [(curvature[i], rows.unsqueeze(2) * rows.unsqueeze(1))]

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
class Diagonal:
    """One curvature per weight, correlations left out."""

    sizes: tuple[int, ...] = ()
    advice: str = "set `modules` to cover fewer layers"
    adds_up: bool = True
    has_second_pass: bool = False
    fits_by_jacobians: bool = True
    couples_groups: bool = False
    scalar_only: bool = False

    def bound(self, engine: Engine) -> Diagonal:
        """Return the structure for a model's tensors."""
        return replace(self, sizes=tuple(engine.sizes))

    def add(
        self, engine: Engine, sums: Tensor | None, x: Any, y: Tensor, expected: int | None
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's diagonal."""
        loss, diagonal = batch_curvature.diagonal(engine, x, y)
        return loss, diagonal if sums is None else sums + diagonal

    def tensors(self, sums: Tensor) -> list[Tensor]:
        """Return the one tensor."""
        return [sums]

    def finish(self, engine: Engine, sums: Tensor, n: int) -> Tensor:
        """Return the diagonal."""
        return sums

    def merge(self, raw: Tensor, n: int, other: Tensor, m: int) -> Tensor:
        """Return the sum of two diagonals."""
        return raw + other

    def ready(self, engine: Engine, raw: Tensor) -> Tensor:
        """Return the diagonal.

        Raises:
            FloatingPointError: If it is not finite.
        """
        if not bool(raw.isfinite().all()):
            raise FloatingPointError("the diagonal curvature is not finite")
        return raw

    def raw(self, curvature: Tensor) -> Tensor:
        """Return the diagonal."""
        return curvature

    def precision(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> DiagonalPrecision:
        """Return ``scale · curvature + prior``."""
        return DiagonalPrecision(scale * curvature, expanded(prior, self.sizes), self.sizes)

    def log_det_ratio(self, curvature: Tensor, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        return torch.log1p((scale * curvature / expanded(prior, self.sizes)).double()).sum()

    def pack(self, curvature: Tensor) -> tuple[dict[str, Tensor], Any]:
        """Return the diagonal under a name."""
        return pack_tensor(curvature)

    def unpack(self, engine: Engine, tensors: Mapping[str, Tensor], description: Any) -> Tensor:
        """Return a packed diagonal."""
        return self.ready(engine, unpack_tensor(tensors, description, [sum(self.sizes)]))

    def unpack_device(self, device: torch.device) -> torch.device:
        """Return the posterior's device."""
        return device

    def to(self, curvature: Tensor, device: torch.device) -> Tensor:
        """Return the diagonal on another device."""
        return curvature.to(device)

    def size(self, engine: Engine, curvature: Tensor | None) -> int:
        """Return the number of weights."""
        return sum(self.sizes)

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the bytes of the diagonal."""
        return engine.dtype.itemsize * self.size(engine, None)

    def check_prior(self, length: int, n_layers: int, n_params: int) -> None:
        """Accept any prior precision."""

    def arguments(self) -> dict[str, Any]:
        """Return no arguments."""
        return {}
