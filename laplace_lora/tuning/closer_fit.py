"""Whether training stopped too early: closer fits of the linearised base model, judged left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from laplace_lora.tuning.linear_model import LinearModel, Mode
from laplace_lora.tuning.shared_inputs import standard_error

HALVINGS = 40  # of the precision; separable labels would be fitted ever more closely
CLOSER = 2.0  # standard errors by which a closer fit must be better


def closer_fit(
    linear: LinearModel,
    mode: Mode,
    losses: Callable[[Mode], Tensor],
    companions: Mapping[int, Sequence[int]] | None = None,
) -> Mode:
    """Return the closer fit with the best leave-one-out loss; the mode, if none is clearly better.

    Args:
        linear: The base model.
        mode: How closely the network fits.
        losses: Leave-one-out NLL of every example at a mode.
        companions: Examples that share an input with others, see `SharedInputs`.
    """
    start = losses(mode)
    best, lowest, trial = mode, start, mode
    for _ in range(HALVINGS):
        trial = linear.mode(trial.precision / 2, trial)
        found = losses(trial)
        if not float(found.mean()) < float(lowest.mean()):
            break
        best, lowest = trial, found
    gain = start - lowest
    return best if float(gain.mean()) > CLOSER * standard_error(gain, companions) else mode
