"""`LeaveOneOut`: what a tuning by leave-one-out chose, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import dataclass

from laplace_lora.tuning.left_out.recentring import Recentring
from laplace_lora.tuning.left_out.width_choice import GRID, NONE


@dataclass(frozen=True)
class LeaveOneOut:
    """What a tuning by leave-one-out chose, and what it expects on new data of the same kind.

    Attributes:
        prior_precision: The choice.
        nll_map: Mean leave-one-out NLL without any width, in nats.
        nll: The same with the posterior's width, the best that was tried.
        standard_error: Of the difference of the two; NaN of a single example, which has none.
        base_precision: Prior precision at which the linearised base model fits the training
            labels as closely as the posterior's mean.
        examples: Training examples that it looked at.
        recentring: Where the posterior's mean was moved, if it was.
        sharing: How many of the examples share a text or another input with others, and were left
            out together with them.
        too_many: How many of these share texts with so many pairs that the width leaves out their
            own curvature alone, see `CavityWidths`.
        rivals: How many other classes an example was told apart from, drawn at random; 0 for all.
        is_unclear: Whether the posterior gets no width, since the best was as wide as is tried and
            not clearly better than none, see `Width`.
        is_sharing_unknown: Whether examples that share an input could not be looked for, as some
            tensors of the batches do not have a row for each example.
        knows_labels: Whether the base model's own biases were trained, too, so that its
            linearisation has seen the labels and these NLLs are too low.
        noise: Standard deviation of a regression's observation noise, where it was tuned as well.
        narrowest: The largest prior precision that was tried.
    """

    prior_precision: float
    nll_map: float
    nll: float
    standard_error: float
    base_precision: float
    examples: int
    recentring: Recentring | None = None
    sharing: int = 0
    too_many: int = 0
    rivals: int = 0
    is_unclear: bool = False
    is_sharing_unknown: bool = False
    knows_labels: bool = False
    noise: float | None = None
    narrowest: float = float(GRID[-1])

    @property
    def is_widthless(self) -> bool:
        """Whether no width helps: the largest precision tried, next to nothing beside a noise."""
        return self.prior_precision > NONE * self.narrowest

    def __str__(self) -> str:
        moved = "" if self.recentring is None else f"{self.recentring}; "
        known = not math.isnan(self.standard_error)
        spread = f" (difference ± {self.standard_error:.3f})" if known else ""
        width = (
            f"NLL of the base model's linearisation {self.nll_map:.3f} -> {self.nll:.3f} with the "
            f"posterior's width{spread}"
        )
        if self.is_unclear:
            width += ", as wide as is tried and not clearly better, so it gets none"
        elif self.is_widthless:
            width = "no width helps (predictions are those of the mean alone)"
        if self.knows_labels:
            width += "; too low, as biases of the base model were trained and know the labels"
        some = f", {self.too_many} with too many for the width" if self.too_many else ""
        shared = f" ({self.sharing} share inputs{some})" if self.sharing else ""
        if self.is_sharing_unknown:
            shared = (
                " (copies among them are not left out, as tensors without a row for each example "
                "hide them)"
            )
        if self.rivals:
            shared += f", told apart from {self.rivals} random classes each"
        noise = "" if self.noise is None else f" and observation noise {self.noise:.3g}"
        return (
            f"leave-one-out of {self.examples} examples{shared}: {moved}prior precision "
            f"{self.prior_precision:.3g}{noise}, {width}"
        )
