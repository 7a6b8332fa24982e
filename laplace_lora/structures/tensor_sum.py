"""`TensorSum`: what structures share whose curvature is one tensor, a plain sum over examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.rounded import in_working_dtype

Self = TypeVar("Self", bound="TensorSum")


@dataclass(frozen=True)
class TensorSum:
    """A curvature that is one tensor; sums, raw and ready forms are the same.

    Attributes:
        sizes: Numbers in each trainable tensor.
    """

    not_finite: ClassVar[str]

    sizes: tuple[int, ...] = ()
    advice: str = ""
    adds_up: bool = True
    has_second_pass: bool = False
    fits_by_jacobians: bool = True
    couples_groups: bool = False
    scalar_only: bool = False

    @property
    def shape(self) -> list[int]:
        """Shape of the tensor."""
        raise NotImplementedError

    def gradient_term(self, curvature: Tensor, gradient: Tensor, displacement: Tensor) -> None:
        """Return ``None``: the curvature is no exact one, or not of all directions."""

    def bound(self: Self, engine: Engine) -> Self:
        """Return the structure for a model's tensors."""
        return replace(self, sizes=tuple(engine.sizes))

    def of_batch(
        self, engine: Engine, x: Any, y: Tensor, gradient: LossGradient | None
    ) -> tuple[Tensor, Tensor]:
        """Return a batch's loss and its tensor; add its gradient of the loss up."""
        raise NotImplementedError

    def add(
        self,
        engine: Engine,
        sums: Tensor | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, Tensor]:
        """Add a batch's tensor."""
        loss, tensor = self.of_batch(engine, *batch, gradient)
        return loss, tensor if sums is None else sums + tensor

    def tensors(self, sums: Tensor) -> list[Tensor]:
        """Return the one tensor."""
        return [sums]

    def finish(self, engine: Engine, sums: Tensor, n: int) -> Tensor:
        """Return the tensor."""
        return sums

    def merge(self, raw: Tensor, n: int, other: Tensor, m: int) -> Tensor:
        """Return the sum of two tensors."""
        return raw + other

    def ready(self, engine: Engine, raw: Tensor) -> Tensor:
        """Return the tensor.

        Raises:
            FloatingPointError: If it is not finite.
        """
        if not bool(raw.isfinite().all()):
            raise FloatingPointError(self.not_finite)
        return raw

    def raw(self, curvature: Tensor) -> Tensor:
        """Return the tensor."""
        return curvature

    def pack(self, curvature: Tensor, exact: bool = True) -> tuple[dict[str, Tensor], Any]:
        """Return the tensor by its name, and its shape; ``exact`` has no effect."""
        return {"matrix": curvature}, list(curvature.shape)

    def unpack(self, engine: Engine, tensors: Mapping[str, Tensor], description: Any) -> Tensor:
        """Return a packed tensor.

        Raises:
            ValueError: If the shapes differ, or there is not one tensor.
            FloatingPointError: If it is not finite.
        """
        (curvature,) = in_working_dtype(tensors, engine.dtype).values()
        if list(curvature.shape) != self.shape or description != self.shape:
            raise ValueError(f"the curvature has shape {list(curvature.shape)}, not {self.shape}")
        return self.ready(engine, curvature)

    def unpack_device(self, device: torch.device) -> torch.device:
        """Return the posterior's device."""
        return device

    def to(self, curvature: Tensor, device: torch.device) -> Tensor:
        """Return the tensor on another device."""
        return curvature.to(device)

    def size(self, engine: Engine, curvature: Tensor | None) -> int:
        """Return the number of the tensor's entries."""
        return math.prod(self.shape)

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the bytes of the tensor."""
        return engine.dtype.itemsize * self.size(engine, None)

    def check_prior(self, length: int, n_layers: int, n_params: int) -> None:
        """Accept any prior precision."""

    def arguments(self) -> dict[str, Any]:
        """Return no arguments."""
        return {}
