"""The search for calibrated values: a coarse grid finds the valley, Nelder-Mead its bottom.

Few labels fit several numbers all too well, so each logarithm has a Gaussian prior around its
present value, and labels must speak for what is far from it. What they say must hold on rows that
were not listened to: without a gain by cross-fitting, the present values stay. Beside them the
temperature is searched alone, at next to no width: where a posterior's width helps no held-out
rows, as of tasks that were not learnt, one number is found from fewer labels than three.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

LIMIT = 25.0  # of the logarithms that are searched
FOLDS = 5
VALLEYS = 3  # of the grid, searched for all rows; folds search the deepest
NARROW = 0.01  # variance of an average contrast, in squared logits, that changes no probability
TEMPERATURES = (-1.4, -0.7, -0.35, 0.35, 0.7, 1.05, 1.4, 2.1)  # logarithms
ALONE = 1.5  # width of the prior of a logarithm that is searched alone
OPTIONS = {"xatol": 1e-3, "fatol": 1e-7, "maxiter": 200}

Point = tuple[float, ...]


@dataclass(frozen=True)
class Found:
    """The values that a search chose.

    Attributes:
        best: The point; the start, if nothing beats it by cross-fitting.
        before: Mean loss of all rows at the start.
        after: And at the best point.
        cross_fitted: Each fold of the rows at the point chosen from the others; the mean loss
            before, if the start stays.
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

    def lowest(rows: Tensor, valleys: int = 1) -> Any:
        """Return the best point for some rows; the start, if nothing beats it."""
        totals = table[:, rows].sum(1) + surprises
        order = totals.argsort(stable=True)[:valleys].tolist()
        found = [
            minimize(objective, points[i], (rows,), method="Nelder-Mead", options=OPTIONS).x
            for i in order
        ]
        return min([start, *found], key=lambda point: objective(point, rows))

    everything = torch.ones(len(groups), dtype=torch.bool, device=groups.device)
    best = lowest(everything, VALLEYS)
    number = groups.unique(return_inverse=True)[1]
    folds = number % min(FOLDS, int(number.max()) + 1)
    alone = int(folds.max()) == 0
    held_out = sum(
        float(losses(best if alone else lowest(folds != fold)).double()[folds == fold].sum())
        for fold in folds.unique()
    )
    before, cross_fitted = mean_loss(start, everything), held_out / len(folds)
    if not cross_fitted < before:
        return Found(start, before, before, before)
    return Found(best, before, mean_loss(best, everything), cross_fitted)


def search_with_temperature(
    losses: Callable[[Any], Tensor],
    start: Point,
    candidates: Sequence[Point],
    widths: Sequence[float],
    groups: Tensor,
    at_temperature: Callable[[float], Point],
) -> Found:
    """Return what `search` finds, or the temperature alone where it is better by cross-fitting.

    Args:
        losses: See `search`.
        start: See `search`.
        candidates: See `search`.
        widths: See `search`.
        groups: See `search`.
        at_temperature: From the logarithm of a temperature to the point with next to no width.
    """
    found = search(losses, start, candidates, widths, groups)
    grid = [(temperature,) for temperature in TEMPERATURES]
    alone = search(
        lambda point: losses(at_temperature(float(point[0]))), (0.0,), grid, (ALONE,), groups
    )
    if not alone.cross_fitted < found.cross_fitted:
        return found
    return replace(alone, best=at_temperature(float(alone.best[0])), before=found.before)


def narrow_scale(variance: float) -> float:
    """Return the logarithm of the covariance scale that leaves next to no width.

    Args:
        variance: Mean variance of a contrast at a scale of 1, in squared logits.
    """
    return min(math.log(NARROW / variance), LIMIT) if variance > 0 else LIMIT


def exponential(value: float) -> float:
    """Return the exponential of a logarithm that is searched."""
    return math.exp(min(max(value, -LIMIT), LIMIT))
