"""Whether training stopped too early: closer fits of the linearised base model, scored left out.

The base model is linearised at the trained `lora_A` and head, which know something of the labels,
the more the harder they were trained. So its word counts only as long as the network fits the
labels hardly more closely than they can be predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from laplace_lora.tuning.left_out.linear_model import LinearModel, Mode
from laplace_lora.tuning.left_out.shared_inputs import standard_error

HALVINGS = 40  # of the precision; separable labels would be fitted ever more closely
CLOSER = 2.0  # standard errors by which a closer fit must be better
EARLY = 0.6  # of the loss left out: a network whose training loss is below has overfitted already


def closer_fit(
    linear: LinearModel,
    mode: Mode,
    left_out: Callable[[Mode], Tensor],
    losses: Callable[[Tensor], Tensor],
    companions: Mapping[int, Sequence[int]] | None = None,
) -> Mode:
    """Return the closer fit with the best leave-one-out loss.

    The mode, if none is clearly better, or if labels are fitted much more closely than predicted.

    Args:
        linear: The base model.
        mode: How closely the network fits.
        left_out: From a mode to every example's functions without it, ``(N, c)``.
        losses: From such functions to every example's NLL.
        companions: Examples that share an input with others, see `SharedInputs`.
    """
    means = left_out(mode)
    # Both as the linear model counts them: tempered, and without a Gaussian's constants.
    if mode.nll < EARLY * linear.nll(means):
        return mode
    start = losses(means)
    best, lowest, trial = mode, start, mode
    for _ in range(HALVINGS):
        trial = linear.mode(trial.precision / 2, trial)
        found = losses(left_out(trial))
        if not float(found.mean()) < float(lowest.mean()):
            break
        best, lowest = trial, found
    gain = start - lowest
    return best if float(gain.mean()) > CLOSER * standard_error(gain, companions) else mode
