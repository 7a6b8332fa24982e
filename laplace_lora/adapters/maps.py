"""What a trainable linear map is, and how its input and output gradient follow from its module's.

A plain map is its module: it sees what the module sees. Adapters that keep several maps in one
module are `peft_maps`', tensors that belong to no linear map `uncovered`'s. Which maps a model has
belongs to `adapters`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Call(NamedTuple):
    """One call of a module: what it was given, and what it returned."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    @property
    def x(self) -> Tensor:
        """The first argument."""
        return self.args[0] if self.args else next(iter(self.kwargs.values()))


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

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Numbers of dimensions that the module's input may have."""
        return (2, 3)

    @property
    def has_tokens(self) -> bool:
        """Whether an input's second dimension counts tokens, of which some may be padding."""
        return True

    @property
    def is_diagonal(self) -> bool:
        """Whether its curvature is kept as a diagonal, not as Kronecker factors."""
        return False

    def misfit(self, calls: Sequence[Call], batch: int, texts: int = 1) -> str | None:
        """Return why Kronecker factors cannot express what the map did, ``None`` if they can.

        Args:
            calls: The module's calls in a forward pass.
            batch: Number of examples.
            texts: Number of texts of an example, each of which may have a length of its own.
        """
        if not calls:
            return f"layer {self.name!r} did not run in the forward pass"
        each = max(1, len(calls) // texts)  # calls on one text
        shapes = [tuple(call.x.shape) for call in calls]
        same = all(shape == shapes[i - i % each] for i, shape in enumerate(shapes))
        if len(calls) % texts or not same:
            return (
                f"layer {self.name!r} ran {len(calls)} times in one forward pass with inputs of "
                f"different shapes {list(dict.fromkeys(shapes))} (relative attention, say), which "
                "its Kronecker factors cannot express"
            )
        x = calls[0].x
        if x.ndim not in self.input_dims or x.shape[0] != batch:
            return (
                f"layer {self.name!r} received an input of shape {tuple(x.shape)} in a batch of "
                f"{batch}, expected {' or '.join(map(str, self.input_dims))} dimensions, the first "
                "the batch"
            )
        return None

    def sides(self, parameter: nn.Parameter) -> list[int]:
        """Return the lengths of the sides of a tensor's Kronecker block."""
        return list(parameter.shape) if parameter.ndim == 2 else [parameter.numel()]

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's tensors, and whether each is a bias."""
        weight, bias = self.module.weight, self.module.bias
        return [(weight, False)] + ([] if bias is None else [(bias, True)])

    def read(self, call: Call) -> Tensor:
        """Return the map's input, from a call of its module."""
        return self.own_input(call.x.detach())

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
class ConvMap(LinearMap):
    """An `nn.Conv2d`: a linear map of the patches of its input, weights shared over positions.

    Source: Grosse and Martens (2016), *A Kronecker-factored approximate Fisher matrix for
    convolution layers*, arXiv:1602.01407; with the input covariance a mean over positions.
    """

    @property
    def input_dims(self) -> tuple[int, ...]:
        """Images: ``(batch, channels, height, width)``."""
        return (4,)

    @property
    def has_tokens(self) -> bool:
        """Positions of an image are all real."""
        return False

    def sides(self, parameter: nn.Parameter) -> list[int]:
        """Return ``[channels out, patch]`` for the weight."""
        weight = parameter.ndim == 4
        return [self.out_features, self.in_features] if weight else [self.out_features]

    def own_input(self, x: Tensor) -> Tensor:
        """Return the patches, ``(batch, positions, channels · height · width of the kernel)``."""
        conv = self.module
        return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT

    def own_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return gradients by position, ``(batch, positions, channels out)``."""
        return grad.flatten(2).mT


@dataclass(frozen=True, eq=False)
class Block:
    """A trainable tensor: the weight or the bias of a linear map, or one that counts as a bias.

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
