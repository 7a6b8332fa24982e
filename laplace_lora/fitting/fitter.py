"""`Fitter`: from training data, other posteriors or a given curvature to a posterior's state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_lora.adapters.configuration import function_settings
from laplace_lora.adapters.frozen_values import frozen_values
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.data.distributed import Together, together
from laplace_lora.data.one_draw import same_draw
from laplace_lora.display.warning import warn
from laplace_lora.fitting.accumulation import accumulate
from laplace_lora.fitting.evidence_pass import with_gradient_term
from laplace_lora.fitting.passes import FitSums, Pass, RowPass, Sums
from laplace_lora.fitting.second_pass import corrected
from laplace_lora.fitting.snapshots import Snapshot, point_out_other_counts
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.storage.identity import check_identity, identity
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.state import PosteriorState


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
        progress_bar: bool | None,
        checkpoint_dir: str | os.PathLike[str] | None,
        checkpoint_every: int | None,
        evidence_correction: bool | None,
    ) -> PosteriorState:
        """Return the state at the model's current weights, see `LoraLaplace.fit`."""
        posterior = self.posterior
        if not hasattr(train_loader, "dataset"):
            raise TypeError(
                f"fit needs a DataLoader (an iterable with `dataset`), got "
                f"{type(train_loader).__name__}; wrap the data in torch.utils.data.DataLoader"
            )
        if checkpoint_every is not None and checkpoint_dir is None:
            raise ValueError("checkpoint_every needs checkpoint_dir")
        if posterior.structure.has_second_pass:
            same_draw(train_loader, "eigenvalue_correction")
        posterior.engine.recording.start_anew()  # data of another form may come
        snapshots: list[Snapshot] = []
        in_step = posterior.engine.passes_are_known
        with together(train_loader, runs=posterior.source, in_step=in_step) as team:
            if checkpoint_dir is not None:
                point_out_other_counts(checkpoint_dir)

            def summed(data_pass: Pass) -> Sums:
                snapshot = None
                if checkpoint_dir is not None:
                    snapshot = Snapshot(checkpoint_dir, checkpoint_every, posterior, data_pass)
                    snapshots.append(snapshot)
                return accumulate(posterior, data_pass, train_loader, progress_bar, snapshot, team)

            state = self._summed_up(train_loader, summed, override, evidence_correction)
            for snapshot in reversed(snapshots):
                snapshot.remove()
        return state

    def _summed_up(
        self,
        train_loader: DataLoader[Any],
        summed: Callable[[Pass], Sums],
        override: bool,
        evidence_correction: bool | None,
    ) -> PosteriorState:
        posterior, structure = self.posterior, self.posterior.structure
        sums = summed(self._first_pass(train_loader))
        if posterior.objective.rows_are_tokens and not sums.labels:
            raise ValueError("no token of the training data has a label that counts: all are -100")
        if posterior.objective.has_independent_labels and not sums.labels:
            raise ValueError("no label of the training data is known: all are -100 or NaN")
        raw = structure.finish(posterior.engine, sums.state.curvature, sums.n)
        loss, n, found = sums.loss, sums.n, sums.state.gradient
        gradient = None if found is None else found.total
        earlier = posterior.state
        if earlier.is_fitted and not override:
            before = structure.raw(earlier.curvature)
            raw = structure.merge(raw, n, before, earlier.n_data)
            loss, n = loss + earlier.loss, n + earlier.n_data
            gradient = _total(gradient, earlier.loss_gradient)
        if structure.has_second_pass:
            raw = corrected(posterior.engine, raw, sums.n, summed)
        curvature = structure.ready(posterior.engine, raw)
        state = self._state(curvature, loss, gradient, n, posterior.engine.n_outputs)
        if evidence_correction and n == sums.n:  # data fitted earlier cannot be seen again
            try:
                same_draw(train_loader, "it")
                state = with_gradient_term(replace(posterior, state=state), summed)
            except ValueError as error:  # a loader that cannot be iterated twice, or draws anew
                warn(f"the gradient term is not measured: {error}")
        return state

    def with_gradient_term(
        self, train_loader: Iterable[Any], progress_bar: bool | None
    ) -> PosteriorState:
        """Return the state with what the evidence's gradient term needs.

        Raises:
            ValueError: If they are not those of the fit.
        """
        with together(train_loader, runs=self.posterior.source) as team:

            def summed(data_pass: Pass) -> Sums:
                args = (self.posterior, data_pass, train_loader, progress_bar, None, team)
                return accumulate(*args)

            return with_gradient_term(self.posterior, summed)

    def adopt(
        self, raw: Any, n_data: int, train_loader: Iterable[Any] | None = None
    ) -> PosteriorState:
        """Return the state with a curvature from elsewhere, see `LoraLaplace.adopt`."""
        posterior = self.posterior
        curvature = posterior.structure.ready(posterior.engine, raw)
        loss, outputs = math.nan, getattr(posterior.model, "n_outputs", None)
        if train_loader is not None:
            with together(train_loader, runs=self.posterior.source) as team:
                loss, outputs = self._loss_of(train_loader, team)
        if outputs is None:
            raise ValueError("the model does not say how many outputs it has; give `train_loader`")
        return self._state(curvature, loss, None, n_data, outputs)

    def merge(self, others: Sequence[Posterior]) -> PosteriorState:
        """Return the state of all data together, see `LoraLaplace.merge`."""
        posterior, structure = self.posterior, self.posterior.structure
        raw = structure.raw(posterior.state.curvature)
        n, loss = posterior.state.n_data, posterior.state.loss
        gradient = posterior.state.loss_gradient
        expected = identity(posterior)
        if len({id(part.state) for part in (posterior, *others)}) <= len(others):
            raise ValueError("a posterior merges with others, each given once: data count once")
        for other in others:
            if other.kind != posterior.kind or other.arguments != posterior.arguments:
                raise ValueError("only posteriors of one class with the same arguments merge")
            if other.backend_name != posterior.backend_name:
                raise ValueError(
                    "only posteriors of one backend merge, got "
                    f"{posterior.backend_name} and {other.backend_name}"
                )
            _check_readout(posterior.source, other.source)
            check_identity(expected, identity(other))
            added = structure.to(other.state.curvature, posterior.device)
            raw = structure.merge(raw, n, structure.raw(added), other.state.n_data)
            n, loss = n + other.state.n_data, loss + other.state.loss
            gradient = _total(gradient, other.state.loss_gradient)
        curvature = structure.ready(posterior.engine, raw)
        return self._state(curvature, loss, gradient, n, posterior.state.n_outputs)

    def _state(
        self, curvature: Any, loss: float, gradient: Tensor | None, n_data: int, n_outputs: int
    ) -> PosteriorState:
        posterior = self.posterior
        return PosteriorState(
            # The model may have been brought to another dtype since they were given.
            settings=posterior.settings.of_new_data().to(posterior.device, posterior.dtype),
            curvature=curvature,
            mean=posterior.current_weights(),
            sizes=tuple(posterior.engine.sizes),
            loss=loss,
            n_data=n_data,
            n_outputs=n_outputs,
            loss_gradient=gradient,
            frozen=frozen_values(posterior.source, posterior.engine.parameters),
            adapter=function_settings(posterior.source),
        )

    def _loss_of(self, loader: Iterable[Any], team: Together) -> tuple[float, int | None]:
        """Return the summed loss, and the number of outputs."""
        posterior, loss = self.posterior, 0.0
        outputs: int | None = None
        with evaluation_mode(posterior.model), torch.no_grad():
            for batch in team.batches(loader, "Summing the loss", by_example=posterior.by_example):
                x, y = posterior.split(batch)
                f = posterior.model(x)
                loss += posterior.objective.nll(f, y).item()
                outputs = f.shape[-1]
        return team.total(loss)[0], team.any_of(outputs)

    def _first_pass(self, loader: DataLoader[Any]) -> Pass:
        engine, structure = self.posterior.engine, self.posterior.structure
        expected = None
        with suppress(TypeError):  # a stream has no length
            expected = len(loader.dataset)  # type: ignore[arg-type]

        def add(sums: FitSums | None, x: Any, y: Tensor) -> tuple[Tensor, FitSums]:
            if sums is None:
                place = (engine.sizes, engine.dtype, engine.device)
                sums = FitSums(None, None if engine.draws_labels else LossGradient(*place))
            loss, sums.curvature = structure.add(
                engine, sums.curvature, (x, y), sums.gradient, expected
            )
            return loss, sums

        def tensors(sums: FitSums) -> list[Tensor]:
            gradient = [] if sums.gradient is None else [sums.gradient.total]
            return [*structure.tensors(sums.curvature), *gradient]

        return (Pass if structure.adds_up else RowPass)(add, tensors)


def _total(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Return the sum of two gradients, ``None`` where one is not known."""
    return None if a is None or b is None else a + b.to(a)


def _check_readout(source: Any, other: Any) -> None:
    """Refuse models whose outputs are read by functions that differ, as far as names tell.

    Two functions of one name may still differ in what they close over.

    Raises:
        ValueError: If one model has a function ``output`` and the other none, or one of another
            name.
    """
    if source.output == other.output or _name(source.output) == _name(other.output):
        return
    raise ValueError(
        "only posteriors that read the model's outputs alike merge, got LogitsModel(output="
        f"{_name(source.output)}) and LogitsModel(output={_name(other.output)}); make both with "
        "one function"
    )


def _name(function: object) -> str:
    """Return the name of a function, or of the class of another callable."""
    if function is None:
        return "None"
    if isinstance(function, partial):
        return _name(function.func)
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"
