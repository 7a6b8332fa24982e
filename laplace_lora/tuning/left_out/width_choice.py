"""The prior precision with the best loss on left-out examples.

Of a task at chance the best width is often the widest that is tried, or as good as it. It drowns
the mean, and the shape of the covariance alone decides for a class; on shifted inputs no width is
better. So such a width must be clearly better than none, or the posterior has none.

A regression's width and its noise explain the same errors, and a wide posterior with little noise
may look as good as the noise alone. So the narrowest is taken that is within a standard error of
the best (the one-standard-error rule; Breiman, Friedman, Olshen and Stone 1984, *Classification and
regression trees*, section 3.4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora.tuning.left_out.shared_inputs import standard_error
from laplace_lora.tuning.line_search import refined

GRID = torch.logspace(-4, 8, 49, dtype=torch.float64)  # prior precisions
NONE = 0.9 * float(GRID[-1])  # larger ones are no width
FLAT = 1e-3  # nats; the widest is as good if it is worse by no more
CLEAR = 1.0  # standard errors by which such a width must be better than none


@dataclass(frozen=True)
class Width:
    """A prior precision, and what speaks for it.

    Attributes:
        prior_precision: The choice; the largest of `GRID` where the best is not clear.
        nll: Mean loss with the chosen width, in nats; with the best where that is not clear.
        gain: By how much it is lower than without any.
        standard_error: Of the gain; NaN of a single example.
        is_clear: Whether that width is better than the widest, or better than none by more
            than the standard error.
    """

    prior_precision: float
    nll: float
    gain: float
    standard_error: float
    is_clear: bool


def best_width(
    losses: Callable[[float], Tensor],
    bare: Tensor,
    companions: Mapping[int, Sequence[int]] | None = None,
    narrow: bool = False,
) -> Width:
    """Return the prior precision with the lowest mean loss.

    Args:
        losses: From the logarithm of a prior precision to every example's loss, ``(examples,)``.
        bare: The losses without any width.
        companions: Examples that share an input with others, see `SharedInputs.companions`.
        narrow: Take the largest precision whose loss is within a standard error of that.
    """

    def mean_loss(log_precision: float) -> float:
        return float(losses(log_precision).mean())

    points = GRID.log().tolist()
    found = [mean_loss(point) for point in points]
    best = refined(mean_loss, points, found, 1e-3)
    wide = losses(best)
    if narrow:
        trials = ((point, losses(point)) for point in reversed(points))
        as_good = (trial for trial in trials if _are_as_good(trial[1], wide, companions))
        best, wide = next(as_good, (best, wide))
    nll, gain = float(wide.mean()), float((bare - wide).mean())
    error = standard_error(bare - wide, companions)
    is_clear = found[0] - nll > FLAT or gain > CLEAR * error
    return Width(math.exp(best if is_clear else points[-1]), nll, gain, error, is_clear)


def _are_as_good(
    losses: Tensor, best: Tensor, companions: Mapping[int, Sequence[int]] | None
) -> bool:
    """Return whether losses are worse than the best by no more than a standard error."""
    excess = losses - best
    return float(excess.mean()) <= standard_error(excess, companions)
