"""`FunctionRows`: a model's functions of its training examples, and what moves them.

Of large models the Jacobians are compressed: products with fixed random matrices keep inner
products up to a few per cent (Johnson and Lindenstrauss 1984).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from laplace_lora.adapters.start import checked_unchanged
from laplace_lora.curvature.engine import Engine
from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.start import before_adapter
from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.left_out.linear_model import LinearModel, Mode


class FunctionRows:
    """Functions of a model's outputs and their Jacobians, batch by batch.

    Args:
        posterior: Whose likelihood and noise count.
        engine: Of the model.
        readout: The functions.
        numbers: How many numbers a function's Jacobian may take; larger ones are compressed.
        at_weights: Makes contexts in which the model is at the weights that are meant.
        of_base: Whether the model's adapter is to change nothing there, which the first batch
            verifies.
    """

    def __init__(
        self,
        posterior: Posterior,
        engine: Engine,
        readout: Readout,
        numbers: float = math.inf,
        at_weights: Callable[[], AbstractContextManager[None]] = nullcontext,
        of_base: bool = False,
    ) -> None:
        self.posterior, self.engine, self.readout = posterior, engine, readout
        self._at_weights, self._of_base = at_weights, of_base
        self.means: list[Tensor] = []
        # Of each tensor, batch by batch; None where it does not change the functions, as lora_A
        # does not behind a lora_B that is zero.
        self.jacobians: list[list[Tensor | None]] = [[] for _ in engine.blocks]
        small = sum(engine.sizes) <= numbers
        self.share = math.inf if small else numbers / len(engine.blocks)
        self.projections: dict[tuple[int, int], Tensor] = {}  # by tensor and side

    def add(self, x: Any, y: Tensor) -> None:
        """Add a batch."""
        with evaluation_mode(self.engine.model), self._at_weights():
            if self._of_base and not self.means:
                with checked_unchanged(self.engine.model) as is_checked, torch.no_grad():
                    if is_checked:
                        self.engine.model(x)
            f, blocks = self.engine.jacobian_blocks(x, self.readout.columns)
            self.means.append(self.readout.mean(f).double())
            for i, block in enumerate(blocks):
                kept = self._compressed(i, block).flatten(2) if bool(block.any()) else None
                self.jacobians[i].append(kept)

    def linear_model(self, labels: Tensor, team: Together) -> LinearModel:
        """Return the model, linearised in its trainable tensors where it stands.

        Args:
            labels: Of the examples of all processes.
            team: The processes that share them.
        """
        means = team.rows(means=self.means)["means"]
        gram = means.new_zeros(means.numel(), means.numel())
        for i in range(len(self.jacobians)):
            rows = self._rows(i, team)
            if rows is not None:
                gram += rows @ rows.T
        scale = float(self.posterior.scale)
        options = (self.posterior.objective, self.readout.relative, scale)
        return LinearModel(gram, means, labels, *options)

    def weights(self, mode: Mode, team: Together) -> Tensor:
        """Return the weights of a mode of the linear model less the model's own, ``(parameters,)``.

        Jacobians must not have been compressed.
        """
        alpha = mode.coefficients.flatten() / mode.precision
        parts = []
        for i, size in enumerate(self.engine.sizes):
            rows = self._rows(i, team)
            parts.append(alpha.new_zeros(size) if rows is None else alpha @ rows)
        return torch.cat(parts)

    def _rows(self, i: int, team: Together) -> Tensor | None:
        """Return a tensor's Jacobians, ``(functions, numbers)``; ``None`` if all are zero."""
        width = team.longest(part.shape[-1] for part in self.jacobians[i] if part is not None)
        if not width:
            return None
        dtype = self.engine.dtype
        parts = [
            torch.zeros(*mean.shape, width, dtype=dtype).to(mean.device) if part is None else part
            for mean, part in zip(self.means, self.jacobians[i], strict=True)
        ]
        rows = team.rows(rows=parts)["rows"].flatten(0, 1)
        return rows.double()  # else rounding has negative signs

    def _compressed(self, i: int, block: Tensor) -> Tensor:
        """Return Jacobians ``(batch, columns, *shape)`` with sides that fit a tensor's share."""
        shape = block.shape[2:]
        if shape.numel() <= self.share:
            return block
        if len(shape) != 2:
            block = block.flatten(2).unsqueeze(-1)
        p, q = block.shape[2:]
        short = max(int(min(p, q, math.sqrt(self.share))), 1)
        long = max(int(self.share / short), 1)
        sides = (short, long) if p <= q else (long, short)
        if sides[0] < p:
            block = self._projection((i, 0), p, sides[0], block).mT @ block
        return block @ self._projection((i, 1), q, sides[1], block) if sides[1] < q else block

    def _projection(self, key: tuple[int, int], size: int, width: int, like: Tensor) -> Tensor:
        if key not in self.projections:
            source = torch.Generator().manual_seed(2 * key[0] + key[1])
            matrix = torch.randn(size, width, generator=source) / math.sqrt(width)
            self.projections[key] = matrix.to(like)
        return self.projections[key]


@contextmanager
def base_rows(posterior: Posterior, readout: Readout, numbers: float) -> Iterator[FunctionRows]:
    """Yield the rows of the base model, linearised where its adapter had learnt nothing.

    Args:
        posterior: A fitted posterior.
        readout: The functions.
        numbers: See `FunctionRows`.

    Raises:
        ValueError: If the adapter did not start so.
    """
    with before_adapter(posterior.source) as (twin, at_start):
        engine = Engine(
            twin, posterior.objective, posterior.engine.root, None, "diag", verify=False
        )
        yield FunctionRows(posterior, engine, readout, numbers, at_start, of_base=True)
