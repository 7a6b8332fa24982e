"""What a trainable linear map is, and how its input and output gradient follow from its module's.

A plain map is its module: it sees what the module sees. AdaLoRA keeps its three tensors in one
module; each is a map of its own here. Which maps a model has belongs to `adapters`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A map ``x ↦ W x + b`` with something to train.

    Attributes:
        name: Name of the module in the model.
        module: An `nn.Linear`, or GPT-2's `Conv1D` that stores ``Wᵀ``; what is hooked.
        in_features: Length of an input, ``q``.
        out_features: Length of an output, ``p``.
        transposed: Whether the weight is stored as ``(q, p)``.
        layer: The adapted layer it is part of, if any. Its input, in another number format, may be
            the map's.
    """

    name: str
    module: Any
    in_features: int
    out_features: int
    transposed: bool
    layer: nn.Module | None = None

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's tensors, and whether each is a bias."""
        weight, bias = self.module.weight, self.module.bias
        return [(weight, False)] + ([] if bias is None else [(bias, True)])

    def own_input(self, x: Tensor) -> Tensor:
        """Return the map's input, from its module's."""
        return x

    def own_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the map's output.

        Args:
            x: The map's own input.
            grad: Gradient with respect to the module's output.
        """
        return grad


@dataclass(frozen=True, eq=False)
class TripletMap(LinearMap):
    """One of the three tensors of AdaLoRA's ``y = base(x) + c B (E ∘ (A x))``.

    ``A`` maps ``x``, ``B`` maps ``E ∘ (A x)``. ``E``, ``(r, 1)``, multiplies entry by entry; it is
    the bias of a map whose output gradient is ``(A x) ∘ (c Bᵀ g)`` summed over an example's tokens,
    so its curvature is exact.

    Attributes:
        adapter: Name of the adapter.
        role: ``"A"``, ``"E"`` or ``"B"``.
    """

    adapter: str = "default"
    role: str = "A"

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's one tensor; ``E`` counts as a bias."""
        return [(getattr(self.module, f"lora_{self.role}")[self.adapter], self.role == "E")]

    def own_input(self, x: Tensor) -> Tensor:
        """Return ``x`` for ``A``, ``A x`` for ``E``, ``E ∘ (A x)`` for ``B``."""
        A, E, _ = self._triplet()
        x = x.to(A.dtype)
        if self.role == "A":
            return x
        inner = x @ A.T
        return inner if self.role == "E" else inner * E.squeeze(-1)

    def own_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the map's output; summed over tokens for ``E``."""
        _, E, B = self._triplet()
        layer = self.module
        scale = layer.scaling[self.adapter] / (layer.ranknum[self.adapter].detach() + 1e-5)
        grad = grad.to(B.dtype) * scale.to(B.dtype)
        if self.role == "B":
            return grad
        inner = grad @ B
        if self.role == "A":
            return inner * E.squeeze(-1)
        return (x * inner).flatten(1, -2).sum(1) if x.ndim > 2 else x * inner

    def _triplet(self) -> tuple[Tensor, Tensor, Tensor]:
        layer, name = self.module, self.adapter
        return tuple(part[name].detach() for part in (layer.lora_A, layer.lora_E, layer.lora_B))


@dataclass(frozen=True, eq=False)
class Block:
    """A trainable tensor: the weight or the bias of a linear map.

    Attributes:
        name: Name of the parameter in the model.
        parameter: The tensor itself.
        map: Index of its linear map among the model's trainable ones.
        is_bias: Whether it is the bias.
    """

    name: str
    parameter: nn.Parameter
    map: int
    is_bias: bool


def wide_dtype(parameters: list[nn.Parameter]) -> torch.dtype:
    """Return float64 if any tensor has it, else float32: what sums over them are kept in."""
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if double else torch.float32
