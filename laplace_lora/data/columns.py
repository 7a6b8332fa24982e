"""Columns with a row for each example: those of batches joined, and those of processes in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.inapplicable import InapplicableError

Columns = dict[str, Tensor]


def joined_columns(columns: Mapping[str, Sequence[Tensor]]) -> Columns:
    """Return columns of batches as columns of all their rows; those without any are left out.

    Args:
        columns: For each batch a tensor with a row per example.

    Raises:
        ValueError: If the rows of batches differ in shape.
    """
    return {name: _joined(parts) for name, parts in columns.items() if parts}


def in_order(reports: Sequence[tuple[Columns, Tensor]]) -> Columns:
    """Return the rows of several processes in the order of the data.

    Args:
        reports: For each process its columns, and the place of each row in the data. A column that
            a process with rows lacks is left out.
    """
    reports = [(columns, places) for columns, places in reports if len(places)]
    if not reports:
        return {}
    names = [n for n in reports[0][0] if all(n in columns for columns, _ in reports)]
    order = torch.cat([places for _, places in reports]).argsort()
    return {name: torch.cat([columns[name] for columns, _ in reports])[order] for name in names}


def padded(value: Tensor, width: int, fill: float = 0) -> Tensor:
    """Return rows filled up on the right to a width.

    Args:
        value: Shape ``(rows, columns, ...)``.
        width: How many columns the result has.
        fill: What stands in the new ones.
    """
    others = (0, 0) * (value.ndim - 2)
    return F.pad(value, (*others, 0, width - value.shape[1]), value=fill)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    shapes = list(dict.fromkeys(tuple(part.shape[1:]) for part in parts))
    if len(shapes) > 1:
        raise InapplicableError(
            f"the rows of batches have different shapes, {shapes[:3]}, as with different numbers "
            "of outputs or choices, and cannot be joined in one table; take the batches of each "
            "shape by themselves"
        )
    return torch.cat(list(parts))
