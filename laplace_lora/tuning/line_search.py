"""The minimum of a function of one number whose valley a grid has found."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy.optimize import minimize_scalar


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
