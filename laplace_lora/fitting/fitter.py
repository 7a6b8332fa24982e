"""`Fitter`: from training data, other posteriors or a given curvature to a posterior's state."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_lora.fitting.accumulation import accumulate
from laplace_lora.fitting.passes import Pass, RowPass, Sums
from laplace_lora.fitting.second_pass import corrected
from laplace_lora.fitting.snapshots import Snapshot
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.storage.fingerprint import check_identity, identity
from laplace_lora.structures.state import Posterior, PosteriorState


class Fitter:
    """Makes the state of a posterior.

    Args:
        posterior: The posterior before; it is not changed.
    """

    def __init__(self, posterior: Posterior) -> None:
        self.posterior = posterior

    def fit(
        self,
        train_loader: DataLoader[Any],
        override: bool,
        progress_bar: bool,
        checkpoint_dir: str | os.PathLike[str] | None,
        checkpoint_every: int | None,
    ) -> PosteriorState:
        """Return the state at the model's current weights, see `LoraLaplace.fit`."""
        posterior, structure = self.posterior, self.posterior.structure
        if not hasattr(train_loader, "dataset"):
            raise TypeError(
                f"fit needs a DataLoader (an iterable with `dataset`), got "
                f"{type(train_loader).__name__}; wrap the data in torch.utils.data.DataLoader"
            )
        if checkpoint_every is not None and checkpoint_dir is None:
            raise ValueError("checkpoint_every needs checkpoint_dir")
        snapshots: list[Snapshot] = []

        def summed(data_pass: Pass) -> Sums:
            snapshot = None
            if checkpoint_dir is not None:
                snapshot = Snapshot(checkpoint_dir, checkpoint_every, posterior, data_pass)
                snapshots.append(snapshot)
            return accumulate(posterior, data_pass, train_loader, progress_bar, snapshot)

        sums = summed(self._first_pass(train_loader))
        raw = structure.finish(posterior.engine, sums.state, sums.n)
        loss, n = sums.loss, sums.n
        earlier = posterior.state
        if earlier.is_fitted and not override:
            before = structure.raw(earlier.curvature)
            raw = structure.merge(raw, n, before, earlier.n_data)
            loss, n = loss + earlier.loss, n + earlier.n_data
        if structure.has_second_pass:
            raw = corrected(posterior.engine, raw, sums.n, summed)
        state = self._state(raw, loss, n, posterior.engine.n_outputs)
        for snapshot in reversed(snapshots):
            snapshot.remove()
        return state

    def adopt(
        self, raw: Any, n_data: int, train_loader: Iterable[Any] | None = None
    ) -> PosteriorState:
        """Return the state with a curvature from elsewhere, see `LoraLaplace.adopt`."""
        posterior = self.posterior
        loss, outputs = math.nan, getattr(posterior.model, "n_outputs", None)
        if train_loader is not None:
            loss = 0.0
            with evaluation_mode(posterior.model), torch.no_grad():
                for batch in train_loader:
                    x, y = posterior.split(batch)
                    f = posterior.model(x)
                    loss += posterior.objective.nll(f, y).item()
                    outputs = f.shape[-1]
        if outputs is None:
            raise ValueError("the model does not say how many outputs it has; give `train_loader`")
        return self._state(raw, loss, n_data, outputs)

    def merge(self, others: Sequence[Posterior]) -> PosteriorState:
        """Return the state of all data together, see `LoraLaplace.merge`."""
        posterior, structure = self.posterior, self.posterior.structure
        raw = structure.raw(posterior.state.curvature)
        n, loss = posterior.state.n_data, posterior.state.loss
        expected = identity(posterior)
        for other in others:
            if other.kind != posterior.kind or other.arguments != posterior.arguments:
                raise ValueError("only posteriors of one class with the same arguments merge")
            check_identity(expected, identity(other))
            added = structure.to(other.state.curvature, posterior.device)
            raw = structure.merge(raw, n, structure.raw(added), other.state.n_data)
            n, loss = n + other.state.n_data, loss + other.state.loss
        return self._state(raw, loss, n, posterior.state.n_outputs)

    def _state(self, raw: Any, loss: float, n_data: int, n_outputs: int) -> PosteriorState:
        posterior = self.posterior
        return PosteriorState(
            posterior.settings.uncalibrated(),
            posterior.structure.ready(posterior.engine, raw),
            posterior.current_weights(),
            tuple(posterior.engine.sizes),
            loss,
            n_data,
            n_outputs,
        )

    def _first_pass(self, loader: DataLoader[Any]) -> Pass:
        engine, structure = self.posterior.engine, self.posterior.structure
        expected = None
        with suppress(TypeError):  # a stream has no length
            expected = len(loader.dataset)  # type: ignore[arg-type]

        def add(sums: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
            return structure.add(engine, sums, x, y, expected)

        return (Pass if structure.adds_up else RowPass)(add, structure.tensors)
