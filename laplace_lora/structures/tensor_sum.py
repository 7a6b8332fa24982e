"""`TensorSum`: what structures share whose curvature is one tensor, a plain sum over examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from laplace_lora.curvature.engine import Engine
from laplace_lora.linalg.finite import all_finite, check_diagonal
from laplace_lora.structures.base import Structure

Self = TypeVar("Self", bound="TensorSum")


@dataclass(frozen=True)
class TensorSum(Structure[Tensor, Tensor, Tensor]):
    """A curvature that is one tensor; sums, raw and ready forms are the same.

    Attributes:
        sizes: Numbers in each trainable tensor.
    """

    not_finite: ClassVar[str]

    sizes: tuple[int, ...] = ()

    @property
    def shape(self) -> list[int]:
        """Shape of the tensor."""
        raise NotImplementedError

    def bound(self: Self, engine: Engine) -> Self:
        """Return the structure for a model's tensors."""
        return replace(self, sizes=tuple(engine.sizes))

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
            ValueError: If it has another shape, or negative entries on its diagonal.
            FloatingPointError: If it is not finite.
        """
        if list(raw.shape) != self.shape:
            raise ValueError(f"the curvature has shape {list(raw.shape)}, not {self.shape}")
        if not all_finite(raw):
            raise FloatingPointError(self.not_finite)
        check_diagonal(raw)
        return raw

    def raw(self, curvature: Tensor) -> Tensor:
        """Return the tensor."""
        return curvature

    def pack(self, curvature: Tensor, exact: bool = True) -> tuple[dict[str, Tensor], Any]:
        """Return the tensor by its name, and its shape; ``exact`` has no effect."""
        return {"matrix": curvature}, list(curvature.shape)

    def unpack(self, engine: Engine, tensors: Mapping[str, Tensor], description: Any) -> Tensor:
        """Return a packed tensor in the dtype that it has there.

        Raises:
            ValueError: If there is not one tensor, or as `ready`.
            FloatingPointError: If it is not finite.
        """
        (curvature,) = tensors.values()
        if description != self.shape:
            raise ValueError(f"the curvature is described as {description}, not as {self.shape}")
        return self.ready(engine, curvature)

    def to(self, curvature: Tensor, device: torch.device) -> Tensor:
        """Return the tensor on another device."""
        return curvature.to(device)

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the tensor's bytes."""
        return engine.dtype.itemsize * math.prod(self.shape)
