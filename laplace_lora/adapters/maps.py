"""Trainable linear maps: how their inputs and output gradients follow from those of a module.

A plain map is one module. See `peft_maps` for adapters that keep several maps in one module, and
`diagonal_maps` for tensors of no linear map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.data.examples import Examples
from laplace_lora.data.masks import Place

WIDER = 4  # times that an input is shorter than an output, to differentiate by it instead
# Experts that are modules of their own, as transformers' Switch and NLLB-MoE call them.
ROUTED = re.compile(r"(^|\.)experts\.(expert_)?\d+(\.|$)")
ROUTING = (
    "layer {name!r} belongs to an expert, which sees the tokens that are routed to it, so whose "
    "they are is unknown"
)


class Call(NamedTuple):
    """One call of a module: its arguments and its output.

    Attributes:
        args: Positional arguments.
        kwargs: Arguments by name.
        output: What the module itself returned, before any hook of the user's replaced it.
        gradient: Where the output's gradient can be watched; ``None`` if it has none.
        source: Place in the graph of the first argument, if it carries a gradient and is much
            shorter than the output.
        place: At whose tokens an encoder-decoder's layer stands in it, if that is known.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    gradient: Any = None
    source: Any = None
    place: Place | None = None

    @property
    def x(self) -> Tensor:
        """The first argument."""
        x: Tensor = self.args[0] if self.args else next(iter(self.kwargs.values()))
        return x


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A map ``x ↦ W x + b`` with trainable tensors.

    Attributes:
        name: Name of the module in the model.
        module: The module to hook: an `nn.Linear`, or GPT-2's `Conv1D`, which stores ``Wᵀ``.
        in_features: Length of an input, ``q``.
        out_features: Length of an output, ``p``.
        transposed: Whether the weight is stored as ``(q, p)``.
        layer: The adapted layer that the map is part of, if any. Its input may be the map's, cast
            to another dtype.
        input_dims: Allowed numbers of dimensions of the module's input.
        has_tokens: Whether an input's rows stand at tokens, some of which may be padding.
        is_diagonal: Whether the curvature is kept as a diagonal, not as Kronecker factors.
    """

    name: str
    module: Any  # the attributes of PEFT's and transformers' layers are not typed
    in_features: int
    out_features: int
    transposed: bool
    layer: nn.Module | None = None
    input_dims: ClassVar[tuple[int, ...]] = (2, 3, 4, 5)
    has_tokens: ClassVar[bool] = True
    is_diagonal: ClassVar[bool] = False

    @property
    def sums_tokens(self) -> bool:
        """Whether `map_grad` sums over the tokens of a row."""
        return False

    @property
    def has_unit_inputs(self) -> bool:
        """Whether inputs are unit vectors, so that sums of their outer products are diagonal."""
        return False

    @property
    def is_idle(self) -> bool:
        """Whether the module runs without its adapter now, so that the call is not the map's."""
        return False

    @property
    def inner(self) -> nn.Module | None:
        """The module within the map's own whose calls `step` needs, if any."""
        return None

    @property
    def widens(self) -> bool:
        """Whether an input is much shorter than an output, and is that of the module itself."""
        return type(self) is LinearMap and WIDER * self.in_features <= self.out_features

    def misfit(self, calls: Sequence[Call], examples: Examples, texts: int = 1) -> str | None:
        """Return why the calls cannot be represented by Kronecker factors, ``None`` if they can.

        Args:
            calls: The module's calls in a forward pass.
            examples: Of the batch.
            texts: Number of texts per example, which may differ in length.
        """
        if not calls and hasattr(self.layer, "parameter_name"):  # PEFT's wrapper of a parameter
            return (
                f"LoRA on a parameter (target_parameters), {self.name!r}, is added to the weight "
                "and never runs as a layer, so its inputs and gradients cannot be captured"
            )
        if not calls:
            return f"layer {self.name!r} did not run in the forward pass"
        per_text = max(1, len(calls) // texts)
        shapes = [tuple(call.x.shape) for call in calls]
        same = all(shape == shapes[i - i % per_text] for i, shape in enumerate(shapes))
        if len(calls) % texts or not same:
            return (
                f"layer {self.name!r} ran {len(calls)} times in one forward pass with inputs of "
                f"different shapes {list(dict.fromkeys(shapes))} (as in relative attention), which "
                "Kronecker factors cannot represent"
            )
        x = calls[0].x
        if self.is_routed(x):
            return ROUTING.format(name=self.name)
        if x.ndim not in self.input_dims or not examples.have(x):
            return (
                f"layer {self.name!r} received an input of shape {tuple(x.shape)} in a batch of "
                f"{examples.count}, expected the batch first, or as many rows of each example as "
                f"it has choices or tokens, and {_ranged(self.input_dims)} dimensions"
            )
        return None

    def is_routed(self, x: Tensor) -> bool:
        """Return whether the rows of an expert's input are tokens that are routed to it."""
        # They may be as many as the examples by chance, in any batch: none shows it.
        return x.ndim == 2 and ROUTED.search(self.name) is not None

    def parameters(self) -> list[tuple[nn.Parameter, bool]]:
        """Return the map's tensors, each with whether it is a bias."""
        weight, bias = self.module.weight, self.module.bias
        return [(weight, False)] + ([] if bias is None else [(bias, True)])

    def step(
        self, x: Tensor, output: Tensor, inner: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what the map itself gets and returns in a call of its module.

        Args:
            x: The module's first argument.
            output: What the module returned.
            inner: The same two of the module within it.
        """
        return x, output

    def read(self, call: Call) -> Tensor:
        """Return the map's input in a call of its module."""
        return self.map_input(call.x.detach())

    def map_input(self, x: Tensor) -> Tensor:
        """Return the map's input, given the module's."""
        return x

    def map_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient with respect to the map's output.

        Args:
            x: Input of the map, as `read` returns it.
            grad: Gradient with respect to the module's output.
        """
        return grad


@dataclass(frozen=True, eq=False)
class ConvMap(LinearMap):
    """An `nn.Conv2d`: a linear map of the patches of its input, with weights shared by positions.

    Source: Grosse and Martens (2016), *A Kronecker-factored approximate Fisher matrix for
    convolution layers*, arXiv:1602.01407, but with the input covariance a mean over positions.
    """

    input_dims = (4,)  # images, (batch, channels, height, width)
    has_tokens = False  # no position is padding

    def map_input(self, x: Tensor) -> Tensor:
        """Return the patches, ``(batch, positions, channels · height · width of the kernel)``."""
        conv = self.module
        return F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride).mT

    def map_grad(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return gradients by position, ``(batch, positions, channels out)``."""
        return grad.flatten(2).mT


@dataclass(frozen=True, eq=False)
class Block:
    """A trainable tensor: the weight or the bias of a linear map, or one treated as a bias.

    Attributes:
        name: Name of the parameter in the model.
        parameter: The tensor itself.
        map: Index of its linear map among the model's trainable ones.
        is_bias: Whether it is a bias, or treated as one.
    """

    name: str
    parameter: nn.Parameter
    map: int
    is_bias: bool

    @property
    def sides(self) -> list[int]:
        """Lengths of the sides of its Kronecker block; a bias has one, of any shape."""
        shape = self.parameter.shape
        return [shape.numel()] if self.is_bias else [shape[0], shape[1:].numel()]


def _ranged(numbers: tuple[int, ...]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def wide_dtype(parameters: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype of sums over the parameters: float64 if any has it, else float32."""
    double = any(parameter.dtype == torch.float64 for parameter in parameters)
    return torch.float64 if double else torch.float32
