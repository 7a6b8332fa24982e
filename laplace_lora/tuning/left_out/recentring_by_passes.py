"""The mode of the linearised model of many examples, from a few passes over them.

No Jacobian is kept. The functions are known along a few directions of the weights, in which the
mode is found exactly; the gradient that is left there, preconditioned by the posterior's own
curvature, gives the next directions, as in conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError
from laplace_lora.predictive.tangents import OtherOutputsError, tangents_along, tangents_are_cheaper
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.directions import orthonormal, preconditioned
from laplace_lora.tuning.left_out.linear_model import LinearModel, Mode
from laplace_lora.tuning.left_out.rivals import loss_among
from laplace_lora.tuning.left_out.spanned_model import SpannedModel
from laplace_lora.tuning.validation.cache import labelled_batches, validation_rows

TITLE = "Recentring"  # of the progress bar
PASSES = 5
UNKNOWN = 1.0  # prior precision in the first preconditioner, where a training loss is asked for
SOLVED = 1e-4  # gradient relative to the first, below which there is no further step


@dataclass(frozen=True)
class Aim:
    """Which mode of a linearised model is looked for.

    Attributes:
        nll: Mean training NLL that it is to have, in nats divided by the temperature; or
        precision: prior precision.
        rivals: Of how many other classes the labels are told apart in ``nll``; 0 for all.
    """

    nll: float | None = None
    precision: float | None = None
    rivals: int = 0

    def mode(self, model: LinearModel | SpannedModel, functions: LinearModel) -> Mode:
        """Return a model's mode, given its functions of the training examples."""
        if self.precision is not None:
            return model.mode(self.precision)
        assert self.nll is not None
        loss = loss_among(functions, self.rivals)
        return model.fitted_like(len(functions.labels) * self.nll, loss)


def mode_by_passes(data: TrainingPasses, aim: Aim) -> tuple[Tensor, Mode, float, int]:
    """Return how far the linearised model's mode is from the trained weights, nearly.

    Iterates over the data five times at most, in any order: once for the derivatives along each
    step's directions, once for the gradient in between.

    Returns:
        The shift ``(parameters,)``, the mode, the summed NLL at the trained weights in the same
        unit, and how many examples there were.
    """
    posterior = data.posterior
    gradient, passes = posterior.state.loss_gradient, 0
    if gradient is None:
        gradient, passes = data.gradient(), 1
    else:
        gradient = float(posterior.scale.detach()) * gradient
    first, delta = float(gradient.norm()), UNKNOWN if aim.precision is None else aim.precision
    directions = gradient.new_empty(0, len(gradient))
    while True:
        further = preconditioned(posterior, gradient, delta)
        directions = orthonormal(torch.cat([directions, further]))
        model, passes = data.spanned(directions), passes + 1
        mode = aim.mode(model, model.functions)
        shift = mode.coefficients.to(directions) @ directions
        if passes + 2 > PASSES:
            break
        delta = mode.precision
        gradient, passes = data.gradient(shift) + delta * shift, passes + 1
        if float(gradient.norm()) <= SOLVED * first:
            break
    return shift, mode, model.functions.nll(model.functions.offset), len(model.rows)


@dataclass(frozen=True)
class TrainingPasses:
    """The training data of a fitted posterior, of which each call makes a pass.

    Attributes:
        posterior: The posterior.
        loader: Its training data.
        team: The processes that share the loader.
        readout: The functions of the outputs that its predictions are about.
        progress_bar: Whether to show progress, see `progress`.
    """

    posterior: Posterior
    loader: Any
    team: Together
    readout: Readout
    progress_bar: bool | None

    def spanned(self, directions: Tensor) -> SpannedModel:
        """Return the model of all examples in the span of directions."""
        offsets: list[Tensor] = []
        rows: list[Tensor] = []
        labels: list[Tensor] = []
        for x, y in self.batches():
            offset, slopes = self._slopes(x, directions)
            offsets.append(offset)
            rows.append(slopes)
            labels.append(y)
        found = validation_rows(self.team, offset=offsets, rows=rows, labels=labels)
        return SpannedModel(self._functions(found["offset"], found["labels"]), found["rows"])

    def gradient(self, shift: Tensor | None = None) -> Tensor:
        """Return the gradient of the linear model's summed NLL, at a shift of the weights."""
        engine = self.posterior.engine
        total = torch.zeros_like(self.posterior.mean, dtype=torch.float64)
        parts = total.split(engine.sizes)
        for x, y in self.batches():
            moved = None
            if shift is not None:
                offset, slopes = self._slopes(x, shift.unsqueeze(0))
                moved = offset + slopes.squeeze(-1)
            columns = partial(self._residual, y, moved)
            with evaluation_mode(engine.model):
                for part, block in zip(parts, engine.jacobian_blocks(x, columns)[1], strict=True):
                    part.add_(block.flatten(2).double().sum((0, 1)))
        self.team.add_up([total])
        return total.to(self.posterior.mean)

    def batches(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield what the model takes, and labels."""
        return labelled_batches(self.posterior, self.loader, self.team, self.progress_bar, TITLE)

    def _functions(self, values: Tensor, y: Tensor) -> LinearModel:
        """Return the functions of labelled examples as a linear model without its Gram matrix."""
        scale = float(self.posterior.scale.detach())
        options = (self.posterior.objective, self.readout.relative, scale)
        return LinearModel(values.new_empty(0), values, y, *options)

    def _slopes(self, x: Any, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Return a batch's functions, and their derivatives along directions, in float64.

        Args:
            x: Batch that the model takes.
            directions: Shape ``(m, parameters)``.

        Returns:
            Shapes ``(batch, columns)`` and ``(batch, columns, m)``.
        """
        if tangents_are_cheaper(self.posterior, len(directions)):
            try:
                mean, slopes = tangents_along(self.posterior, x, self.readout, directions)
                return mean.double(), slopes.double().movedim(0, -1)
            except (NoForwardDerivativeError, OtherOutputsError):
                pass  # Jacobians do as well
        engine = self.posterior.engine
        with evaluation_mode(engine.model):
            f, blocks = engine.jacobian_blocks(x, self.readout.columns)
            parts = zip(blocks, directions.split(engine.sizes, dim=1), strict=True)
            along = torch.stack([(J.flatten(2) @ V.T).double() for J, V in parts]).sum(0)
        return self.readout.mean(f).double(), along

    def _residual(self, y: Tensor, moved: Tensor | None, f: Tensor) -> Tensor:
        """Return the gradient of the NLL with respect to the outputs, ``(1, batch, outputs)``.

        Args:
            y: Labels.
            moved: The functions' values; those of the outputs if ``None``.
            f: Outputs.
        """
        values = self.readout.mean(f).double() if moved is None else moved
        residual = self._functions(values, y).residual(values).to(f)
        if self.readout.columns is None:
            return residual.unsqueeze(0)
        return torch.einsum("nc,cno->no", residual, self.readout.columns(f)).unsqueeze(0)
