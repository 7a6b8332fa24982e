"""Grids of one number, and the minimum of a function whose valley a grid has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy.optimize import minimize_scalar


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
