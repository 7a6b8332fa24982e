"""Weights whose numbers lie packed in bits: telling them apart, and counting what is in them.

How they are laid out changes with use: a kernel's layout is another on another device, and
bitsandbytes lays weights in 4 bits out anew for passes without gradients on a CPU. Half bytes stay
what they are wherever they are moved to. A tensor subclass, such as torchao's, has a shape, a dtype
and no memory of its own: its numbers are in the tensors within it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from laplace_lora.data.sharding import is_sharded_tensor


def tensor_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that hold a tensor's numbers, with their names: itself, if it is plain.

    Args:
        name: The tensor's name.
        tensor: A tensor that is whole, see `data.sharding.whole`.
    """
    if not is_traceable_wrapper_subclass(tensor):
        yield name, tensor
        return
    subclass: Any = tensor
    keys, _ = subclass.__tensor_flatten__()
    for key in keys:
        yield from tensor_parts(f"{name}.{key}", getattr(subclass, key))


def parts_here(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold a tensor's numbers; itself if processes hold it in pieces."""
    if is_sharded_tensor(tensor):
        return [tensor]
    return [part for _, part in tensor_parts("", tensor)]


def is_packed(part: Tensor) -> bool:
    """Return whether a tensor is no list of numbers in floating point, whatever its dtype says.

    Args:
        part: A tensor with memory of its own, see `tensor_parts`.
    """
    return not part.is_floating_point() or hasattr(part, "quant_state")


def packed_parts(weight: Tensor) -> list[Tensor]:
    """Return the packed tensors in which a weight lies; none if it is plain.

    A plain tensor of integers is one only if it is no list of counts.

    Args:
        weight: A tensor, not detached, which would lose bitsandbytes' marks; one that processes
            hold in pieces is its own part.
    """
    if type(weight) in (Tensor, nn.Parameter) and weight.ndim < 2:
        return []
    return [part for part in parts_here(weight) if is_packed(part)]


def has_packed_weights(layer: nn.Module) -> bool:
    """Return whether a layer by itself holds packed weights."""
    return any(packed_parts(p) for p in layer.parameters(recurse=False))


def bits_of(model: nn.Module) -> int | None:
    """Return in how many bits a model's linear layers are packed; ``None`` if none is.

    Where they differ, the fewest.
    """
    found: list[int] = []
    for layer in model.modules():
        sides = [getattr(layer, key, None) for key in ("in_features", "out_features")]
        numbers = [side for side in sides if isinstance(side, int)]
        size = math.prod(numbers) if len(numbers) == 2 else 0
        if not size:
            continue
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        parts = [part for tensor in own for part in packed_parts(tensor)]
        if parts:
            found.append(round(8 * max(t.numel() * t.element_size() for t in parts) / size))
    return min(found, default=None)


@torch.no_grad()
def half_bytes(part: Tensor) -> Tensor:
    """Return how often each half byte occurs in a tensor's memory, ``(16,)``.

    Args:
        part: A tensor with memory of its own.
    """
    octets = part.detach().contiguous().flatten().view(torch.uint8)
    counts = torch.bincount(octets, minlength=256).reshape(16, 16)
    return counts.sum(0) + counts.sum(1)
