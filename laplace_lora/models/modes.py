"""Context managers that temporarily change a model and always restore it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: the device of the first parameter.

    Parameters that are offloaded are on none.
    """
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(devices, torch.device("meta"))


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; each module's own mode comes back afterwards.

    Gradients flow all the same, see `differentiable`.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with differentiable(model):
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Let gradients flow through bitsandbytes' 4-bit layers temporarily, in evaluation mode.

    On processors with AVX512-BF16 these layers pack their weights anew when they first run without
    gradient in evaluation mode, and have no gradient from then on. That is all the mode means to
    them, so they are put in training mode; writing their state out brings the first packing back.
    """
    layers: list[Any] = [m for m in model.modules() if type(m).__name__ == "Linear4bit"]
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()
    evaluating = [layer for layer in layers if not layer.training]
    for layer in evaluating:
        layer.training = True
    try:
        yield
    finally:
        for layer in evaluating:
            layer.training = False


@contextmanager
def gradients_needed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen floating-point tensors take part in a graph; they are frozen again afterwards."""
    frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def weights_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the weights be overwritten; they come back to the bit afterwards."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def set_weights(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Write a flat vector into parameters, in their own dtype.

    Args:
        parameters: The tensors to overwrite, in the order of the vector.
        vector: New values, shape ``(parameters,)``.
    """
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values in zip(parameters, vector.split(sizes), strict=True):
        parameter.copy_(values.view_as(parameter))
