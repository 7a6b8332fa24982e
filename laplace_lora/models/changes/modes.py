"""Context managers that temporarily change a model and always restore it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn

from laplace_lora.data.sharding import write_values
from laplace_lora.models.changes.attention_types import attention_kept
from laplace_lora.models.changes.holders import Holders
from laplace_lora.models.changes.turns import in_turn


def _switched(name: str, value: bool) -> Holders[Any]:
    """Return holders of objects with an attribute that is true or false, switched to a value."""
    return Holders(lambda x: setattr(x, name, value), lambda x: setattr(x, name, not value))


_EVALUATING = _switched("training", False)
_DIFFERENTIABLE = _switched("training", True)
_UNCACHED = _switched("ENABLE_DORA_CACHING", False)
_THAWED = _switched("requires_grad", True)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: the device of the first parameter.

    Parameters that are offloaded are on none.
    """
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(devices, torch.device("meta"))


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Return the coarsest dtype in which a model computes; bfloat16 if it is quantised."""
    if torch.is_autocast_enabled(device_of(model).type):
        return torch.bfloat16
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        return torch.bfloat16
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; each module's own mode comes back afterwards.

    Gradients flow all the same, see `differentiable`. While one thread holds the mode, other
    threads' forward passes run in it, too.

    Raises:
        TooShortError: In a forward pass of too few tokens for block-sparse attention.
    """
    with in_turn(model):
        modules = list(model.modules())
        others = [module for module in modules if not is_four_bit(module)]
        with (
            _EVALUATING.hold(others, lambda module: module.training),
            differentiable(modules),
            _norms_anew(modules),
            attention_kept(modules),
        ):
            yield


@contextmanager
def _norms_anew(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let DoRA compute its norms in each pass, temporarily, where `peft.helpers.DoraCaching` is on.

    In evaluation mode it keeps those of the first pass otherwise, whatever becomes of the weights.
    """
    for layer in modules:
        if isinstance(layer, dora.DoraLinearLayer):
            layer._cache_clear()  # parts of a graph, which cannot be copied
    with _UNCACHED.hold([dora], lambda module: module.ENABLE_DORA_CACHING):
        yield


@contextmanager
def differentiable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let gradients flow through bitsandbytes' 4-bit layers temporarily, in evaluation mode.

    On processors with AVX512-BF16 these layers pack their weights anew when they first run without
    gradient in evaluation mode, and have no gradient from then on. That is all the mode means to
    them, so they are put in training mode; writing their state out brings the first packing back.
    """
    layers: list[Any] = [module for module in modules if is_four_bit(module)]
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()
    with _DIFFERENTIABLE.hold(layers, lambda layer: not layer.training):
        yield


def is_four_bit(module: nn.Module) -> bool:
    """Return whether a module is bitsandbytes' layer with weights in 4 bits."""
    return type(module).__name__ == "Linear4bit"


@contextmanager
def gradients_needed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen floating-point tensors take part in a graph; they are frozen again afterwards."""
    floating = [p for p in parameters if p.is_floating_point()]
    with _THAWED.hold(floating, lambda p: not p.requires_grad):
        yield


@contextmanager
def weights_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the weights be overwritten; they come back to the bit afterwards."""
    kept = [(parameter, parameter.detach().clone()) for parameter in parameters]

    def write_back() -> None:
        while kept:
            parameter, value = kept[-1]
            write_values(parameter, value)
            kept.pop()

    try:
        yield
    finally:
        try:
            write_back()
        finally:
            write_back()  # for an interrupt of the first


@torch.no_grad()
def set_weights(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Write a flat vector into parameters, in their own dtype.

    Args:
        parameters: The tensors to overwrite, in the order of the vector.
        vector: New values, shape ``(parameters,)``.
    """
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values in zip(parameters, vector.split(sizes), strict=True):
        write_values(parameter, values.view(parameter.shape))
