"""A linear model whose weights lie in the span of a few directions, with exact modes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora.tuning.left_out.linear_model import LinearModel, Loss, Mode, along_path
from laplace_lora.tuning.minima import newton_descent

STEPS = 50


@dataclass(frozen=True)
class SpannedModel:
    """A linear model whose weights lie in the span of orthonormal directions.

    Attributes:
        functions: The model, whose Gram matrix is not looked at.
        rows: The functions' derivatives along the directions, ``(N, c, m)``, float64.
    """

    functions: LinearModel
    rows: Tensor

    def mode(self, precision: float, start: Mode | None = None) -> Mode:
        """Return the mode, its coefficients those of the directions, ``(m,)``.

        By Newton's method with halved steps, see `LinearModel.mode`.
        """
        flat, size = self.rows.flatten(0, 1), self.rows.shape[-1]
        x = flat.new_zeros(size) if start is None else start.coefficients

        def at(x: Tensor) -> tuple[Tensor, float, float]:
            outputs = self.functions.offset + self.rows @ x
            nll = self.functions.nll(outputs)
            return outputs, nll, nll + 0.5 * precision * float(x @ x)

        def step_from(x: Tensor, outputs: Tensor) -> Tensor:
            gradient = flat.T @ self.functions.residual(outputs).flatten() + precision * x
            curved = self.functions.curved(outputs, self.rows).flatten(0, 1)
            matrix = flat.T @ curved + precision * torch.eye(size).to(flat)
            return -torch.linalg.solve(matrix, gradient)

        x, outputs, nll = newton_descent(x, at, step_from, STEPS)
        return Mode(precision, x, outputs, nll)

    def fitted_like(self, nll: float, loss: Loss | None = None) -> Mode:
        """Return the mode whose training loss has a given value, see `LinearModel.fitted_like`."""
        curved = self.functions.curved(self.functions.offset, self.rows)
        unit = float((self.rows * curved).sum()) / self.rows.shape[-1]
        return along_path(self.mode, nll, unit, loss)
