"""Newton's method with halved steps, for the modes of linear models."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

TOLERANCE = 1e-12  # of the objective, relative
SHORTEST = 1e-6  # of a step, below which nothing is better in its direction


def newton_descent(
    x: Tensor,
    at: Callable[[Tensor], tuple[Tensor, float, float]],
    step_from: Callable[[Tensor, Tensor], Tensor],
    steps: int,
) -> tuple[Tensor, Tensor, float]:
    """Return where a convex objective is least, the outputs there and their loss.

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
