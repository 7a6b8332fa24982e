"""Minima: of one number in the valley that a grid has found, and of convex functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy.optimize import minimize_scalar
from torch import Tensor

TOLERANCE = 1e-12  # of the objective, relative
SHORTEST = 1e-6  # of a step, below which nothing is better in its direction


def continued(points: Sequence[float], step: float, low: float, high: float) -> list[float]:
    """Return an ascending grid that goes on in even steps at its ends until it covers a range.

    Args:
        points: The grid, kept as it is.
        step: Between further points.
        low: What the first point must not exceed.
        high: What the last point must reach.
    """
    below, above = [points[0]], [points[-1]]
    while below[-1] > low:
        below.append(below[-1] - step)
    while above[-1] < high:
        above.append(above[-1] + step)
    return [*reversed(below[1:]), *points, *above[1:]]


def refined(
    loss: Callable[[float], float],
    points: Sequence[float],
    values: Sequence[float],
    tolerance: float,
) -> float:
    """Return the minimum between the neighbours of a grid's best point.

    Args:
        loss: The function.
        points: The grid, ascending.
        values: The function there.
        tolerance: Of the minimum's place.

    Returns:
        Its place; the grid's best point, where nothing between the neighbours is lower.
    """
    best = min(range(len(points)), key=values.__getitem__)
    bounds = (points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)])
    found = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": tolerance})
    return float(found.x) if found.fun <= values[best] else points[best]


def newton_descent(
    x: Tensor,
    at: Callable[[Tensor], tuple[Tensor, float, float]],
    step_from: Callable[[Tensor, Tensor], Tensor],
    steps: int,
) -> tuple[Tensor, Tensor, float]:
    """Return where a convex objective is least, the outputs there and their loss.

    By Newton's method with halved steps.

    Args:
        x: Where to start.
        at: From a point to outputs, loss and objective.
        step_from: From a point and its outputs to the Newton step.
        steps: How many at most.
    """
    outputs, nll, objective = at(x)
    for _ in range(steps):
        step, length = step_from(x, outputs), 1.0
        while length > SHORTEST:
            trial = at(x + length * step)
            if trial[2] <= objective:
                break
            length /= 2
        else:
            break
        gain, x = objective - trial[2], x + length * step
        outputs, nll, objective = trial
        if gain <= TOLERANCE * (1 + abs(objective)):
            break
    return x, outputs, nll
