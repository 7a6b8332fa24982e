"""The prior precision with the best loss on left-out examples.

Of a task at chance the best width is often the widest that is tried, or as good as it. It drowns
the mean, and the shape of the covariance alone decides for a class; on shifted inputs no width is
better. So such a width must be clearly better than none, or the posterior has none.

A regression's width and its noise explain the same errors, and a wide posterior with little noise
may look as good as the noise alone. So the narrowest is taken that is within a standard error of
the best (the one-standard-error rule; Breiman, Friedman, Olshen and Stone 1984, *Classification and
regression trees*, section 3.4).

What is wide depends on the unit of a regression's targets: more precisions are tried, until the
largest leaves no width to speak of beside the noise, and the smallest all that one could want.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora.tuning.left_out.shared_inputs import standard_error
from laplace_lora.tuning.minima import continued, refined

GRID = torch.logspace(-4, 8, 49, dtype=torch.float64)  # prior precisions
STEP = math.log(10) / 4  # of their logarithms
NONE = 0.9  # of the largest precision that is tried; larger ones are no width
# Variances under a prior precision of 1 alone, beside that of a regression's noise, for which this
# grid does; and under the largest and the smallest precision, where it does not.
USUAL = (1.0, 1e5)
NARROW, WIDE = 1e-3, 1e7
EXTREME = 1e30  # precisions beyond are none in float32
FLAT = 1e-3  # nats; the widest is as good if it is worse by no more
ROUNDING = 1e-12  # of a mean loss
CLEAR = 1.0  # standard errors by which such a width must be better than none


@dataclass(frozen=True)
class Width:
    """A prior precision, and what speaks for it.

    Attributes:
        prior_precision: The choice; the largest that is tried where the best is not clear.
        nll: Mean loss with the chosen width, in nats; with the best where that is not clear.
        gain: By how much it is lower than without any.
        standard_error: Of the gain; NaN of a single example.
        is_clear: Whether that width is better than the widest, or better than none by more
            than the standard error.
        narrowest: The largest prior precision that was tried.
    """

    prior_precision: float
    nll: float
    gain: float
    standard_error: float
    is_clear: bool
    narrowest: float


def best_width(
    losses: Callable[[float], Tensor],
    bare: Tensor,
    companions: Mapping[int, Sequence[int]] | None = None,
    narrow: bool = False,
    unit: float | None = None,
) -> Width:
    """Return the prior precision with the lowest mean loss.

    Args:
        losses: From the logarithm of a prior precision to every example's loss, ``(examples,)``.
        bare: The losses without any width.
        companions: Examples that share an input with others, see `SharedInputs.companions`.
        narrow: Take the largest precision whose loss is within a standard error of that.
        unit: Of a regression, see `precisions_tried`.
    """

    def mean_loss(log_precision: float) -> float:
        return float(losses(log_precision).mean())

    points = precisions_tried(unit)
    found = [mean_loss(point) for point in points]
    best = refined(mean_loss, points, found, 1e-3)
    wide = losses(best)
    if narrow:
        trials = ((point, losses(point)) for point in reversed(points))
        as_good = (trial for trial in trials if _are_as_good(trial[1], wide, companions))
        best, wide = next(as_good, (best, wide))
    nll, gain = float(wide.mean()), float((bare - wide).mean())
    if unit is not None and abs(gain) <= ROUNDING * abs(nll):
        best = points[-1]  # a width so small that it changes no prediction
    error = standard_error(bare - wide, companions)
    is_clear = found[0] - nll > FLAT or gain > CLEAR * error
    narrowest = math.exp(points[-1])
    return Width(math.exp(best) if is_clear else narrowest, nll, gain, error, is_clear, narrowest)


def precisions_tried(unit: float | None = None) -> list[float]:
    """Return the logarithms of `GRID`, continued at its ends where a regression asks for it.

    Args:
        unit: Of a regression, the largest variance of a function under a prior precision of 1, in
            multiples of the noise's variance.
    """
    points: list[float] = GRID.log().tolist()
    if unit is None or USUAL[0] <= unit <= USUAL[1] or not 0 < unit < math.inf:
        return points
    low, high = max(unit / WIDE, 1 / EXTREME), min(unit / NARROW, EXTREME)
    return continued(points, STEP, math.log(low), math.log(high))


def _are_as_good(
    losses: Tensor, best: Tensor, companions: Mapping[int, Sequence[int]] | None
) -> bool:
    """Return whether losses are worse than the best by no more than a standard error."""
    excess = losses - best
    return float(excess.mean()) <= standard_error(excess, companions)
