"""The search for calibrated values: a coarse grid finds the valley, Nelder-Mead its bottom.

Few labels fit several numbers all too well, so each logarithm has a Gaussian prior around its
present value, and labels must speak for what is far from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

LIMIT = 25.0  # of the logarithms that are searched
FOLDS = 5
OPTIONS = {"xatol": 1e-3, "fatol": 1e-7, "maxiter": 200}

Point = tuple[float, ...]


@dataclass(frozen=True)
class Found:
    """The values that a search chose.

    Attributes:
        best: The point; the start, if nothing beats it.
        before: Mean loss of all rows at the start.
        after: And at the best point.
        cross_fitted: After, each fold of the rows at the point chosen from the others.
    """

    best: Any
    before: float
    after: float
    cross_fitted: float


def search(
    losses: Callable[[Any], Tensor],
    start: Point,
    candidates: Sequence[Point],
    widths: Sequence[float],
    groups: Tensor,
) -> Found:
    """Return the point with the lowest loss of all rows plus ``½ Σ (deviation / width)²``.

    Args:
        losses: From a point to the loss of every row, in nats.
        start: The present values.
        candidates: A coarse grid.
        widths: Of the priors around the start.
        groups: Which rows belong together, in the same fold: numbers ``(rows,)``.
    """

    def surprise(point: Any) -> float:
        """Return how unlikely a point is before there are labels, in nats."""
        deviations = [(a - b) / width for a, b, width in zip(point, start, widths, strict=False)]
        return 0.5 * sum(deviation**2 for deviation in deviations)

    def mean_loss(point: Any, rows: Tensor) -> float:
        return losses(point).double()[rows].mean().item()

    def objective(point: Any, rows: Tensor) -> float:
        value = mean_loss(point, rows) + surprise(point) / int(rows.sum())
        return value if math.isfinite(value) else 1e30

    points = [start, *candidates]
    table = torch.stack([losses(point).double() for point in points])
    table = table.nan_to_num(torch.inf, torch.inf)
    surprises = table.new_tensor([surprise(point) for point in points])

    def lowest(rows: Tensor) -> Any:
        """Return the best point for some rows; the start, if nothing beats it."""
        totals = table[:, rows].sum(1) + surprises
        order = totals.argsort(stable=True)[:3].tolist()
        found = [
            minimize(objective, points[i], (rows,), method="Nelder-Mead", options=OPTIONS).x
            for i in order
        ]
        return min([start, *found], key=lambda point: objective(point, rows))

    everything = torch.ones(len(groups), dtype=torch.bool, device=groups.device)
    best = lowest(everything)
    number = groups.unique(return_inverse=True)[1]
    folds = number % min(FOLDS, int(number.max()) + 1)
    alone = int(folds.max()) == 0
    held_out = sum(
        float(losses(best if alone else lowest(folds != fold)).double()[folds == fold].sum())
        for fold in folds.unique()
    )
    return Found(
        best, mean_loss(start, everything), mean_loss(best, everything), held_out / len(folds)
    )


def exponential(value: float) -> float:
    """Return the exponential of a logarithm that is searched."""
    return math.exp(min(max(value, -LIMIT), LIMIT))
