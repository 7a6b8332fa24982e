"""Move a posterior's mean to the mode of the linearised model.

A network whose training stopped early has not fitted its labels as closely as would do new data
good. The linearised model can be fitted on: its mode is the mean of the GLM predictive that theory
asks for (Immer, Korzepa and Bauer 2021, *Improving predictions of Bayesian neural nets via local
linearization*; Antorán et al. 2022, *Adapting the linearised Laplace model evidence*). Of a network
that was trained to the end it makes predictions worse, see the study's tables: features learnt from
the labels fit them again all too easily. So how closely to fit is asked of the base model's
features, which have seen none, see `leave_one_out`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.left_out.function_rows import FunctionRows
from laplace_lora.tuning.left_out.recentring_by_passes import Aim, TrainingPasses, mode_by_passes
from laplace_lora.tuning.same_data import check_same_data
from laplace_lora.tuning.validation.cache import validation_rows

ROWS = 3000  # examples times columns; the work grows with their cube
BYTES = 2**31


@dataclass(frozen=True)
class Recentring:
    """Where a posterior's mean was moved.

    Attributes:
        precision: Prior precision of the linearised model around the trained weights.
        nll_before: Mean training NLL of the trained weights, in nats.
        nll_after: Of the linearised model at its mode.
    """

    precision: float
    nll_before: float
    nll_after: float

    def __str__(self) -> str:
        return (
            f"recentred at the linearised model's mode under prior precision {self.precision:.3g}: "
            f"training NLL {self.nll_before:.3f} -> {self.nll_after:.3f}"
        )


def columns_of(posterior: Posterior) -> int:
    """Return how many functions of an example's outputs count."""
    return max(posterior.objective.n_columns(posterior.state.n_outputs), 1)


def keeps_jacobians(posterior: Posterior) -> bool:
    """Return whether the Jacobians of all training examples are few enough to be kept."""
    rows = posterior.state.n_data * columns_of(posterior)
    return rows <= ROWS and 4 * rows * sum(posterior.engine.sizes) <= BYTES


def recentred(data: TrainingPasses, aim: Aim) -> tuple[Tensor, Recentring]:
    """Return how far the linearised model's mode is from the trained weights.

    The prior of the linearised model is ``N(θ*, I / precision)``. Iterates over the data once and
    keeps the Jacobians, ``4 · examples · columns · parameters`` bytes, where these are few enough;
    otherwise the mode is approached in at most five passes, see `recentring_by_passes`.

    Returns:
        The shift ``(parameters,)``, and what it does.

    Raises:
        ValueError: If the data are not those of the fit, or the likelihood is one of tokens.
    """
    posterior, scale = data.posterior, float(data.posterior.scale.detach())
    posterior.engine.check_outputs_few()
    if not keeps_jacobians(posterior):
        shift, mode, before, seen = mode_by_passes(data, aim)
        check_same_data(posterior.state, seen, before / scale, "recentring")
    else:
        rows = FunctionRows(posterior, posterior.engine, data.readout)
        labels: list[Tensor] = []
        for x, y in data.batches():
            rows.add(x, y)
            labels.append(y)
        y = validation_rows(data.team, labels=labels)["labels"]
        linear, seen = rows.linear_model(y, data.team), len(y)
        before = linear.nll(linear.offset)
        check_same_data(posterior.state, seen, before / scale, "recentring")
        mode = aim.mode(linear, linear)
        shift = rows.weights(mode, data.team).to(posterior.mean)
    unit = posterior.temperature / seen  # linear models divide the log likelihood by it
    return shift, Recentring(mode.precision, before * unit, mode.nll * unit)
