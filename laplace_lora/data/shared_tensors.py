"""Tensors of a batch that all of its examples share, as positions of shape ``(1, tokens)``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def without_shared(batch: Any, examples: int) -> Any:
    """Return a batch without the tensors that all of its examples share.

    These have one row, of the shape that every example has in another tensor. A single image in a
    batch of texts has one row as well, and is the image of one of them.

    Args:
        batch: Any batch; only a mapping says which of its tensors is what.
        examples: How many it has.
    """
    if not isinstance(batch, Mapping):
        return batch
    shared = {name for name, _ in _shared(batch, examples)}
    return {name: value for name, value in batch.items() if name not in shared}


def with_own_rows(batch: Any, examples: int) -> Any:
    """Return a batch in which every example has its own row of the tensors that all share.

    Args:
        batch: As for `without_shared`.
        examples: How many it has.
    """
    if not isinstance(batch, Mapping):
        return batch
    own = {name: batch[name].expand(shape) for name, shape in _shared(batch, examples)}
    return {**batch, **own}


def _shared(batch: Mapping[str, Any], examples: int) -> list[tuple[str, torch.Size]]:
    """Return the names of shared tensors, and the shapes of what they go with."""
    tensors = {name: x for name, x in batch.items() if isinstance(x, Tensor) and x.ndim > 1}
    shapes = [x.shape for x in tensors.values() if len(x) == examples]
    found = []
    for name, x in tensors.items():
        fitting = [s for s in shapes if len(s) >= x.ndim and s[1 - x.ndim :] == x.shape[1:]]
        if len(x) == 1 < examples and fitting:
            found.append((name, fitting[0]))
    return found
