"""Products of few long rows with each other, for each example of a batch."""

from __future__ import annotations

from torch import Tensor

TILE = 64  # rows and columns that an accelerator multiplies at the price of fewer


def products_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left rightᵀ`` for each example.

    An accelerator computes a small product of long rows on a small part of itself. Several examples
    together fill it, although the products between examples are thrown away.

    Args:
        left: Shape ``(batch, rows, length)``.
        right: The same shape.

    Returns:
        Shape ``(batch, rows, rows)``.
    """
    batch, rows, _ = left.shape
    together = 1 if left.device.type == "cpu" else _divisor(batch, TILE // max(rows, 1))
    if together == 1:
        return left @ right.mT
    return grouped_products(left, right, together)


def grouped_products(left: Tensor, right: Tensor, together: int) -> Tensor:
    """Return ``left rightᵀ`` for each example, computed for several examples at once.

    Args:
        left: Shape ``(batch, rows, length)``.
        right: The same shape.
        together: How many examples; a divisor of the batch.
    """
    batch, rows, length = left.shape
    groups = (batch // together, together * rows, length)
    products = left.reshape(groups) @ right.reshape(groups).mT
    split: Tensor = products.unflatten(2, (together, rows)).unflatten(1, (together, rows))
    return split.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(batch, rows, rows)


def _divisor(number: int, at_most: int) -> int:
    """Return the greatest divisor that is not above a limit, 1 if there is none."""
    return next((d for d in range(min(number, at_most), 0, -1) if number % d == 0), 1)
