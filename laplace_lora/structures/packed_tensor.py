"""A curvature that is one tensor, under a name for a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def pack_tensor(curvature: Tensor) -> tuple[dict[str, Tensor], list[int]]:
    """Return a curvature by its name, and its shape."""
    return {"matrix": curvature}, list(curvature.shape)


def unpack_tensor(tensors: Mapping[str, Tensor], description: Any, sides: list[int]) -> Tensor:
    """Return a packed curvature.

    Args:
        tensors: What `pack_tensor` made.
        description: The shape that was saved.
        sides: The shape that fits the model.

    Raises:
        ValueError: If the shapes differ, or there is not one tensor.
    """
    (curvature,) = tensors.values()
    if list(curvature.shape) != sides or description != sides:
        raise ValueError(f"the curvature has shape {list(curvature.shape)}, not {sides}")
    return curvature
