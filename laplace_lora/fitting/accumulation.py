"""Iterate over training data and add it up, across processes, or resumed after an interruption."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from laplace_lora.data.batches import on_cpu, one_example
from laplace_lora.data.distributed import Together
from laplace_lora.data.steps import steps
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.fitting.snapshots import Snapshot
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.structures.posterior import Posterior

EMPTY = "the training loader is empty, or a stream that can be read only once has been read"


def accumulate(
    posterior: Posterior,
    data_pass: Pass,
    loader: Any,
    progress_bar: bool | None,
    snapshot: Snapshot | None,
    team: Together,
) -> Sums:
    """Add up a loader's batches, those of all processes that share it.

    Args:
        posterior: Splits batches into inputs and labels.
        data_pass: What the pass adds up.
        loader: Batches with labels.
        progress_bar: Whether to show progress, see `progress`.
        snapshot: Where sums are kept on the way, ``None`` for nowhere.
        team: The processes that share the loader.

    Raises:
        ValueError: If the loader is empty, labels are missing or out of range, or a snapshot is
            not of this fit.
        FloatingPointError: If the loss or the curvature is not finite; names batch and layer.
        OtherProcessFailed: If another process that shares the loader failed.
    """
    team.share_main(data_pass.basis)
    sums, example = _local_sums(posterior, data_pass, loader, progress_bar, snapshot, team)
    if not team.shared:
        if sums.state is None:
            raise ValueError(EMPTY)
        return sums
    has_data = sums.batches > 0
    if not all(team.all_of(has_data)):
        # A process without examples takes another's, which shows what sums there are.
        lent = team.any_of(example)
        if lent is None:
            raise ValueError(EMPTY)
        if sums.state is None:
            with evaluation_mode(posterior.model):
                _, sums.state = data_pass.add(None, *posterior.split(lent))
    data_pass.combine(sums.state, team, has_data)
    sums.loss, n, labels = team.total(sums.loss, sums.n, sums.labels)
    sums.n, sums.labels = int(n), int(labels)
    return sums


def _local_sums(
    posterior: Posterior,
    data_pass: Pass,
    loader: Any,
    progress_bar: bool | None,
    snapshot: Snapshot | None,
    team: Together,
) -> tuple[Sums, Any]:
    """Return the sums of this process's batches, and for others one of its examples."""
    earlier = None if snapshot is None else snapshot.read()
    kept = 0 if earlier is None else earlier[0].batches
    sums, example, shape, given = Sums(), None, None, 0
    batches = team.batches(loader, data_pass.title, progress_bar, posterior.by_example)
    with evaluation_mode(posterior.model):
        met = posterior.engine.recording.met
        for step in steps(batches, range(1, kept), team, posterior.kind_of, met):
            if not step.is_own:
                # Forgotten, but for the kind of sums, which a process without data needs, too.
                _, shape = data_pass.add(None, *posterior.split(step.batch))
                continue
            batch, index = step.batch, given
            given = index + 1
            if snapshot is not None:
                snapshot.see(batch)
                if given == kept:
                    snapshot.check_seen(given, kept)
            if 0 < index < kept:
                continue
            if team.shared and example is None:
                example = on_cpu(one_example(batch, 0) if posterior.divides(batch) else batch)
            x, y = posterior.split(batch)
            try:
                loss, sums.state = data_pass.add(sums.state, x, y)
            except FloatingPointError as error:
                raise FloatingPointError(f"batch {index} of the training data: {error}") from error
            if earlier is not None and index == 0:
                # The first batch shows what sums there are; their values are those kept.
                data_pass.resume(sums.state, earlier[1])
                sums = replace(earlier[0], state=sums.state, labels=earlier[0].n)
                continue
            sums.loss, sums.n = sums.loss + loss.item(), sums.n + len(y)
            sums.labels += int((y != IGNORED).sum())
            sums.batches = index + 1
            if snapshot is not None:
                snapshot.write(sums)
    if snapshot is not None:
        if given < kept:
            snapshot.check_seen(given, kept)
        snapshot.write(sums, complete=True)
    if sums.state is None:
        sums.state = shape
    return sums, example
