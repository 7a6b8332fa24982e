"""The mode of the linearised model of many examples, from a few passes over them.

No Jacobian is kept. The functions are known along a few directions of the weights, in which the
mode is found exactly; the gradient that is left there, preconditioned by the posterior's own
curvature, gives the next directions, as in conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.structures.state import Posterior
from laplace_lora.tuning.linear_model import LinearModel, along_path
from laplace_lora.tuning.newton import descend
from laplace_lora.tuning.validation_cache import labelled_batches, validation_rows

TITLE = "Recentring"  # of the progress bar
PASSES = 5
SHIFTS = (1.0, 30.0, 1000.0)  # factors of the prior precision in the preconditioner
UNKNOWN = 1.0  # prior precision in the first preconditioner, where a training loss is asked for
STEPS = 50
SOLVED = 1e-4  # gradient relative to the first, below which there is no further step


@dataclass(frozen=True)
class SpannedMode:
    """The most probable functions in a span of directions.

    Attributes:
        precision: Prior precision of the weights.
        coefficients: Of the directions, ``(m,)``.
        nll: Summed negative log likelihood, in nats.
    """

    precision: float
    coefficients: Tensor
    nll: float


@dataclass(frozen=True)
class SpannedModel:
    """A linear model whose weights lie in the span of orthonormal directions.

    Attributes:
        functions: The model, whose Gram matrix is not looked at.
        rows: The functions' derivatives along the directions, ``(N, c, m)``, float64.
    """

    functions: LinearModel
    rows: Tensor

    def mode(self, precision: float, start: SpannedMode | None = None) -> SpannedMode:
        """Return the mode, by Newton's method with halved steps.

        Args:
            precision: Prior precision of the weights.
            start: Where to start, such as the mode at another precision.
        """
        flat, size = self.rows.flatten(0, 1), self.rows.shape[-1]
        x = flat.new_zeros(size) if start is None else start.coefficients

        def at(x: Tensor) -> tuple[Tensor, float, float]:
            outputs = self.functions.offset + self.rows @ x
            nll = self.functions.nll(outputs)
            return outputs, nll, nll + 0.5 * precision * float(x @ x)

        def step_from(x: Tensor, outputs: Tensor) -> Tensor:
            gradient = flat.T @ self.functions.residual(outputs).flatten() + precision * x
            curved = (self.functions.root(outputs) @ self.rows).flatten(0, 1)
            matrix = curved.T @ curved + precision * torch.eye(size).to(flat)
            return -torch.linalg.solve(matrix, gradient)

        x, _, nll = descend(x, at, step_from, STEPS)
        return SpannedMode(precision, x, nll)

    def fitted_like(self, nll: float) -> SpannedMode:
        """Return the mode at the precision at which the training loss has a given value.

        Args:
            nll: Summed negative log likelihood; the nearest is taken where no precision reaches it.
        """
        curved = self.functions.root(self.functions.offset) @ self.rows
        return along_path(self.mode, nll, float(curved.square().sum()) / self.rows.shape[-1])


def mode_by_passes(
    posterior: Posterior,
    loader: Any,
    team: Together,
    readout: Readout,
    progress_bar: bool | None,
    nll: float | None = None,
    precision: float | None = None,
) -> tuple[Tensor, SpannedMode, float, int]:
    """Return how far the linearised model's mode is from the trained weights, nearly.

    Iterates over the data five times at most, in any order: once for the derivatives along each
    step's directions, once for the gradient in between.

    Args:
        posterior: A fitted posterior.
        loader: Its training data.
        team: The processes that share the loader.
        readout: The functions of the outputs that its predictions are about.
        progress_bar: Whether to show progress, see `progress`.
        nll: Mean training NLL that the mode is to have, in nats divided by the temperature; or
        precision: prior precision.

    Returns:
        The shift ``(parameters,)``, the mode, the summed NLL at the trained weights in the same
        unit, and how many examples there were.
    """
    structure, scale = posterior.structure, float(posterior.scale.detach())
    options = (posterior, loader, team, readout, progress_bar)
    gradient, passes = posterior.state.loss_gradient, 0
    if gradient is None:
        gradient, passes = _gradient(*options), 1
    else:
        gradient = scale * gradient
    first, delta = float(gradient.norm()), UNKNOWN if precision is None else precision
    directions = gradient.new_empty(0, len(gradient))
    while True:
        rows = gradient.unsqueeze(0)
        solved = [
            structure.solve(posterior.state.curvature, rows, factor * delta / scale)
            for factor in SHIFTS
        ]
        directions = _orthonormal(torch.cat([directions, *solved, rows]))
        model = _spanned(*options, directions)
        n, passes = len(model.rows), passes + 1
        if precision is None:
            assert nll is not None
            mode = model.fitted_like(n * nll)
        else:
            mode = model.mode(precision)
        shift = mode.coefficients.to(directions) @ directions
        if passes + 2 > PASSES:
            break
        delta = mode.precision
        gradient, passes = _gradient(*options, shift) + delta * shift, passes + 1
        if float(gradient.norm()) <= SOLVED * first:
            break
    return shift, mode, model.functions.nll(model.functions.offset), n


def _orthonormal(directions: Tensor) -> Tensor:
    directions = directions / directions.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return torch.linalg.qr(directions.double().T).Q.T.to(directions)


def _functions(
    posterior: Posterior, readout: Readout, x: Any, y: Tensor
) -> tuple[LinearModel, Iterator[Tensor]]:
    """Return a batch's functions, and their Jacobians tensor by tensor."""
    f, blocks = posterior.engine.jacobian_blocks(x, readout.columns)
    mean = readout.mean(f).double()
    objective, scale = posterior.objective, float(posterior.scale.detach())
    model = LinearModel(mean.new_empty(0), mean, y, objective, readout.relative, scale)
    return model, blocks


def _along(blocks: Iterator[Tensor], directions: Tensor, sizes: list[int]) -> Tensor:
    """Return derivatives along directions ``(m, parameters)``, ``(batch, columns, m)``, float64."""
    parts = zip(blocks, directions.split(sizes, dim=1), strict=True)
    return torch.stack([(J.flatten(2) @ V.T).double() for J, V in parts]).sum(0)


def _spanned(
    posterior: Posterior,
    loader: Any,
    team: Together,
    readout: Readout,
    progress_bar: bool | None,
    directions: Tensor,
) -> SpannedModel:
    """Return the model of all examples in the span of directions."""
    engine = posterior.engine
    offsets: list[Tensor] = []
    rows: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluation_mode(engine.model):
        for x, y in labelled_batches(posterior, loader, team, progress_bar, TITLE):
            model, blocks = _functions(posterior, readout, x, y)
            offsets.append(model.offset)
            rows.append(_along(blocks, directions, engine.sizes))
            labels.append(y)
    found = validation_rows(team, offset=offsets, rows=rows, labels=labels)
    objective, scale = posterior.objective, float(posterior.scale.detach())
    none = found["offset"].new_empty(0)
    options = (found["labels"], objective, readout.relative, scale)
    return SpannedModel(LinearModel(none, found["offset"], *options), found["rows"])


def _gradient(
    posterior: Posterior,
    loader: Any,
    team: Together,
    readout: Readout,
    progress_bar: bool | None,
    shift: Tensor | None = None,
) -> Tensor:
    """Return the gradient of the linear model's summed NLL, at a shift of the weights if given."""
    engine = posterior.engine
    total = torch.zeros_like(posterior.mean, dtype=torch.float64)
    parts = total.split(engine.sizes)
    with evaluation_mode(engine.model):
        for x, y in labelled_batches(posterior, loader, team, progress_bar, TITLE):
            model, blocks = _functions(posterior, readout, x, y)
            moved = model.offset
            if shift is not None:  # the Jacobians anew after that: a batch's are never kept
                moved = moved + _along(blocks, shift.unsqueeze(0), engine.sizes).squeeze(-1)
                _, blocks = _functions(posterior, readout, x, y)
            residual = model.residual(moved)
            for part, block in zip(parts, blocks, strict=True):
                part.add_(torch.einsum("nc,ncp->p", residual.to(block), block.flatten(2)))
    team.add_up([total])
    return total.to(posterior.mean)
