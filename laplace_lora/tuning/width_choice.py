"""The prior precision with the best loss on left-out examples.

Of a task at chance the best width is often the widest that is tried, or as good as it. It drowns
the mean, and the shape of the covariance alone decides for a class; on shifted inputs no width is
better. So such a width must be clearly better than none, or the posterior has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora.tuning.line_search import refined
from laplace_lora.tuning.shared_inputs import standard_error

GRID = torch.logspace(-4, 8, 49, dtype=torch.float64)  # prior precisions
FLAT = 1e-3  # nats; the widest is as good if it is worse by no more
CLEAR = 1.0  # standard errors by which such a width must be better than none


@dataclass(frozen=True)
class Width:
    """A prior precision, and what speaks for it.

    Attributes:
        prior_precision: The choice; the largest of `GRID` where the best is not clear.
        nll: Mean loss with the best width, in nats.
        gain: By how much it is lower than without any.
        standard_error: Of the gain; NaN of a single example.
        is_clear: Whether the best width is better than the widest, or better than none by more
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
) -> Width:
    """Return the prior precision with the lowest mean loss.

    Args:
        losses: From the logarithm of a prior precision to every example's loss, ``(examples,)``.
        bare: The losses without any width.
        companions: Examples that share an input with others, see `SharedInputs.companions`.
    """

    def mean_loss(log_precision: float) -> float:
        return float(losses(log_precision).mean())

    points = GRID.log().tolist()
    found = [mean_loss(point) for point in points]
    best = refined(mean_loss, points, found, 1e-3)
    wide = losses(best)
    nll, gain = float(wide.mean()), float((bare - wide).mean())
    error = standard_error(bare - wide, companions)
    is_clear = found[0] - nll > FLAT or gain > CLEAR * error
    return Width(math.exp(best if is_clear else points[-1]), nll, gain, error, is_clear)
