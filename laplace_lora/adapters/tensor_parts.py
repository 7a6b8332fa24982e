"""The tensors within a tensor subclass, such as torchao's quantised weights.

Such a weight has a shape, a dtype and no memory of its own: its numbers are packed in others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
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
