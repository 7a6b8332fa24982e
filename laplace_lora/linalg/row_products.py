"""Products of few long rows with each other, for each example of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TILE = 64  # rows and columns that an accelerator multiplies at the price of fewer
FEW = 4  # rows, for which forming their products is cheaper than a product for each function
AT_ONCE = 2**20  # products


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


def weighted_products(rows: Tensor, e: Tensor, functions: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``rows diag(f(e)) rowsᵀ`` for each example and several functions ``f``.

    Args:
        rows: Shape ``(batch, rows, length)``.
        e: Shape ``(length,)``.
        functions: From some entries of ``e``, ``(K,)``, to values, ``(K, functions)``. Functions
            that are zero but for a range of ``e`` cost little.

    Returns:
        Shape ``(batch, rows, rows, functions)``.
    """
    batch, count, _ = rows.shape
    if count > FEW:
        order = e.argsort()
        rows, values = rows[..., order], functions(e[order])
        return torch.stack([_weighted(rows, weights) for weights in values.T.contiguous()], -1)
    step = max(AT_ONCE // (batch * count**2), 1)
    total: Any = 0.0
    for part, some in zip(rows.split(step, -1), e.split(step), strict=True):
        total = total + (part.unsqueeze(2) * part.unsqueeze(1)) @ functions(some)
    result: Tensor = total
    return result


def _weighted(rows: Tensor, weights: Tensor) -> Tensor:
    where = weights.nonzero()
    start, stop = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
    part = rows[..., start:stop]
    return products_of_rows(part * weights[start:stop], part)


def _divisor(number: int, at_most: int) -> int:
    """Return the greatest divisor that is not above a limit, 1 if there is none."""
    return next((d for d in range(min(number, at_most), 0, -1) if number % d == 0), 1)
