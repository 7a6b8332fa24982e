"""Ask for the data of the fit, and refuse others."""

from __future__ import annotations

import math
from typing import Any

from laplace_lora.structures.state import PosteriorState

# Data may be augmented at random, and half precision rounds batches of other sizes otherwise.
RELATIVE = 0.5
ABSOLUTE = 0.01  # of an example, of models that have all but no loss


def check_at_hand(train_loader: Any, purpose: str) -> None:
    """Refuse to go on without the data of the fit.

    Args:
        train_loader: The data; ``None`` where they are not at hand.
        purpose: What needs them.

    Raises:
        ValueError: If they are not at hand.
    """
    if train_loader is None:
        raise ValueError(
            f"{purpose} needs the training data, which a posterior keeps only in the process that "
            "fitted it; give `train_loader`"
        )


def check_same_data(state: PosteriorState, seen: int, loss: float | None, purpose: str) -> None:
    """Refuse data with another number of examples, or another loss, than those of the fit.

    Args:
        state: Of a fitted posterior.
        seen: Number of examples.
        loss: Their summed loss at the trained weights, as a fit sums it; ``None`` where it is not
            known.
        purpose: What needs the data.

    Raises:
        ValueError: If they are more or fewer, or their loss is another.
    """
    if seen != state.n_data:
        raise ValueError(
            f"the loader gives {seen} examples, the fit saw {state.n_data}; {purpose} needs the "
            "training data of the fit"
        )
    if loss is None or not math.isfinite(state.loss):  # imported curvatures may come without one
        return
    if abs(loss - state.loss) > RELATIVE * max(loss, state.loss) + ABSOLUTE * seen:
        raise ValueError(
            f"the mean training loss of the loader's examples is {loss / seen:.4g}, on those "
            f"of the fit {state.loss / seen:.4g}; {purpose} needs the same examples and labels"
        )
