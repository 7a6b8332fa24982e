"""Tune a prior on what the training examples would have been predicted to be without their labels.

Trained weights have seen every training label, and so have the features that a linearisation at
them would use: their residuals, and leave-one-out predictions put together from them, promise too
much. The *base* model's features have seen none. So the model is linearised where LoRA starts (its
zero matrices at zero), the precision is found at which this linear model fits the training labels
as closely as the trained network does, and its leave-one-out predictions stand for the network's on
new data. The posterior's width at each example is added to them, and the prior precision with the
best leave-one-out likelihood is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.start import zero_at_start
from laplace_lora.curvature.engine import Engine
from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.start import before_adapter
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.state import Posterior, Settings
from laplace_lora.tuning.line_search import refined
from laplace_lora.tuning.linear_model import LinearModel, without_own
from laplace_lora.tuning.marginal_likelihood import first_precision
from laplace_lora.tuning.validation_cache import ValidationCache, scoring_of

GRID = torch.logspace(-4, 8, 49, dtype=torch.float64)  # prior precisions
ROWS = 3000  # examples times contrasts; the work grows with their cube
BYTES = 2**31


@dataclass(frozen=True)
class LeaveOneOut:
    """What a tuning by leave-one-out chose, and what it expects on new data of the same kind.

    Attributes:
        prior_precision: The choice.
        nll_map: Mean leave-one-out NLL without any width, in nats.
        nll: The same with the posterior's width.
        standard_error: Of the difference of the two.
        base_precision: Prior precision at which the linearised base model fits the training
            labels as closely as the trained network.
    """

    prior_precision: float
    nll_map: float
    nll: float
    standard_error: float
    base_precision: float

    def __str__(self) -> str:
        return (
            f"leave-one-out: prior precision {self.prior_precision:.3g}, NLL of the base model's "
            f"linearisation {self.nll_map:.3f} -> {self.nll:.3f} with the posterior's width "
            f"(difference ± {self.standard_error:.3f})"
        )


def why_not(posterior: Posterior, loader: Any) -> str | None:
    """Return why a posterior cannot be tuned by leave-one-out at reasonable cost.

    Args:
        posterior: A fitted posterior.
        loader: Its training data; ``None`` where they are not at hand.

    Returns:
        The reason, ``None`` where there is none.
    """
    objective, state = posterior.objective, posterior.state
    if not objective.is_classifier:
        return f"a {objective.name} posterior has no class probabilities"
    if loader is None:
        return "the training data are not at hand"
    rows = state.n_data * max(state.n_outputs - 1, 1)
    trainable = sum(p.numel() for p in posterior.source.parameters() if p.requires_grad)
    if rows > ROWS or 4 * rows * trainable > BYTES:
        return f"{state.n_data} training examples of {trainable} weights are too many"
    try:
        zero_at_start(posterior.source)
    except ValueError as error:
        return str(error)
    return None


def tune(
    posterior: Posterior, loader: Any, team: Together, progress_bar: bool
) -> tuple[Settings, LeaveOneOut]:
    """Choose a scalar prior precision by leave-one-out.

    Iterates once over the data: the Jacobians at the base model, and those at the trained weights.

    Args:
        posterior: A fitted posterior, uncalibrated.
        loader: Its training data.
        team: The processes that share the loader.
        progress_bar: Show progress over the batches.

    Returns:
        The settings, and what they promise.

    Raises:
        ValueError: If the adapter did not start at the base model, or the data are not those of the
            fit.
    """
    scoring = scoring_of(posterior, QUADRATURE, 0)
    readout = scoring.readout
    groups = torch.zeros(len(posterior.names), dtype=torch.long)
    scalar = posterior.with_settings(first_precision(posterior))
    with _base_rows(posterior, readout) as rows:
        options = (groups, readout, progress_bar, rows.add, team)
        cache = ValidationCache(Predictor(scalar), loader, *options)
    if len(cache.y) != posterior.state.n_data:
        raise ValueError(
            f"the loader gives {len(cache.y)} examples, the fit saw {posterior.state.n_data}; "
            "leave-one-out needs the training data of the fit"
        )
    linear = rows.linear_model(cache.y, team)
    outputs = cache.mean.double()
    mode = linear.fitted_like(linear.nll(outputs))
    mean, _ = linear.leave_one_out(mode)
    mean = mean.to(cache.mean)
    root = linear.root(outputs).to(cache.mean)

    def losses(log_precision: float) -> Tensor:
        factor = math.exp(log_precision) / float(scalar.settings.prior_precision)
        covariance = cache.covariance(cache.mean.new_tensor([factor]))
        if posterior.structure.couples_groups:  # the exact curvature holds each example's own
            covariance = without_own(covariance, root)
        return scoring.nll(mean, covariance, cache.y).double()

    def mean_loss(log_precision: float) -> float:
        return float(losses(log_precision).mean())

    points = GRID.log().tolist()
    best = refined(mean_loss, points, [mean_loss(point) for point in points], 1e-3)
    precision, wide = math.exp(best), losses(best)
    nothing = mean.new_zeros(*mean.shape, mean.shape[-1])
    narrow = scoring.nll(mean, nothing, cache.y).double()
    error = float((wide - narrow).std() / math.sqrt(len(wide))) if len(wide) > 1 else 0.0
    chosen = scalar.settings.prior_precision.new_tensor([precision])
    report = LeaveOneOut(precision, float(narrow.mean()), float(wide.mean()), error, mode.precision)
    return replace(posterior.settings, prior_precision=chosen), report


class _BaseRows:
    """Functions of the base model's outputs and their Jacobians, batch by batch."""

    def __init__(self, posterior: Posterior, engine: Engine, readout: Readout) -> None:
        self.posterior, self.engine, self.readout = posterior, engine, readout
        self.means: list[Tensor] = []
        self.jacobians: list[list[Tensor]] = [[] for _ in engine.blocks]
        self.moves = [False for _ in engine.blocks]  # which tensors change the functions

    def add(self, x: Any, y: Tensor) -> None:
        """Add a batch."""
        f, blocks = self.engine.jacobian_blocks(x, self.readout.columns)
        self.means.append(self.readout.mean(f).double())
        for i, block in enumerate(blocks):
            if bool(block.any()):
                self.moves[i] = True
            else:  # lora_A's, behind a lora_B that is zero, need no memory
                block = block.new_zeros(()).expand(block.shape)
            self.jacobians[i].append(block.flatten(2))

    def linear_model(self, labels: Tensor, team: Together) -> LinearModel:
        """Return the base model, linearised in its adapter."""
        means = team.rows(means=self.means)["means"]
        gram = means.new_zeros(means.numel(), means.numel())
        anywhere = [any(column) for column in zip(*team.all_of(self.moves), strict=True)]
        for parts, moves in zip(self.jacobians, anywhere, strict=True):
            if moves:
                rows = team.rows(rows=parts)["rows"].flatten(0, 1)
                rows = rows.double()  # else rounding has negative signs
                gram += rows @ rows.T
        scale = float(self.posterior.scale)
        options = (self.posterior.objective, self.readout.relative, scale)
        return LinearModel(gram, means, labels, *options)


@contextmanager
def _base_rows(posterior: Posterior, readout: Readout) -> Iterator[_BaseRows]:
    with before_adapter(posterior.source) as twin:
        engine = Engine(
            twin, posterior.objective, posterior.engine.root, None, "diag", verify=False
        )
        yield _BaseRows(posterior, engine, readout)
