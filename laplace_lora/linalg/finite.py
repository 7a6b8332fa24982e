"""Whether all numbers are finite, asked cheaply."""

from __future__ import annotations

from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether no number is infinite or NaN.

    A sum is many times quicker than a look at each number. It is finite only if they are, but may
    overflow where they are, in half precision say.
    """
    tensor = tensor.detach()
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())
