"""A batch as examples: how many there are, and some of them alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def batch_length(batch: Any) -> int:
    """Return the number of examples in a batch: a mapping, a pair or a tensor."""
    if isinstance(batch, Mapping):
        return next(len(v) for v in batch.values() if isinstance(v, Tensor) and v.ndim)
    return len(batch) if isinstance(batch, Tensor) else batch_length(batch[-1])


def first_examples(batch: Any, count: int) -> Any:
    """Return the first examples of a batch."""
    return _examples(batch, slice(count))


def one_example(batch: Any, n: int) -> Any:
    """Return a batch of one example."""
    return _examples(batch, slice(n, n + 1))


def _examples(batch: Any, which: slice) -> Any:
    if isinstance(batch, Mapping):
        size = batch_length(batch)
        return {
            key: value[which] if hasattr(value, "__len__") and len(value) == size else value
            for key, value in batch.items()
        }
    return batch[which] if isinstance(batch, Tensor) else [_examples(part, which) for part in batch]
