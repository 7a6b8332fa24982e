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


def check_diagonal(sums: Tensor) -> None:
    """Refuse sums of squares that are none.

    Args:
        sums: A matrix, its diagonal or its trace.

    Raises:
        ValueError: If the matrix has negative entries on its diagonal.
    """
    diagonal = sums.diagonal() if sums.ndim == 2 else sums
    if bool((diagonal < 0).any()):
        raise ValueError("the curvature has negative entries on its diagonal")
