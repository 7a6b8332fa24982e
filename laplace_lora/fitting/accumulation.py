"""Iterate over training data and add it up, across processes, or resumed after an interruption."""

from __future__ import annotations

from typing import Any

import torch

from laplace_lora.data.distributed import add_up, agree, common, is_sharded
from laplace_lora.data.loaders import local_batches
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.fitting.snapshots import Snapshot
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.structures.state import Posterior


def accumulate(
    posterior: Posterior,
    data_pass: Pass,
    loader: Any,
    progress_bar: bool,
    snapshot: Snapshot | None,
) -> Sums:
    """Add up a loader's batches, those of all processes that share it.

    Args:
        posterior: Splits batches into inputs and labels.
        data_pass: What the pass adds up.
        loader: Batches with labels.
        progress_bar: Show progress, in the main process.
        snapshot: Where sums are kept on the way, ``None`` for nowhere.

    Raises:
        ValueError: If the loader is empty, labels are missing or out of range, or a snapshot is
            not of this fit.
        FloatingPointError: If the loss or the curvature is not finite; names batch and layer.
        RuntimeError: If another process that shares the loader failed or had no examples.
    """
    shared = is_sharded(loader)
    sums, failure = Sums(), None
    if shared:
        for tensor in data_pass.basis:
            common(tensor)
    try:
        sums = _local_sums(posterior, data_pass, loader, progress_bar, snapshot)
        if sums.state is None and not shared:
            raise ValueError("the training loader is empty")
    except Exception as error:
        if not shared:
            raise
        failure = error  # the other processes must hear of it, or they would wait for ever
    if shared:
        agree(failure, None if sums.state is None else data_pass.signature(sums.state))
        data_pass.combine(sums.state)
        totals = torch.tensor([sums.loss, sums.n], dtype=torch.float64, device=posterior.device)
        add_up([totals])
        sums.loss, sums.n = totals[0].item(), int(totals[1].item())
    return sums


def _local_sums(
    posterior: Posterior,
    data_pass: Pass,
    loader: Any,
    progress_bar: bool,
    snapshot: Snapshot | None,
) -> Sums:
    earlier = None if snapshot is None else snapshot.read()
    sums = Sums()
    batches = local_batches(loader, data_pass.title, progress_bar, posterior.by_example)
    with evaluation_mode(posterior.model):
        for index, batch in enumerate(batches):
            if earlier is not None and 0 < index < earlier[0].batches:
                continue
            x, y = posterior.split(batch)
            try:
                loss, sums.state = data_pass.add(sums.state, x, y)
            except FloatingPointError as error:
                raise FloatingPointError(f"batch {index} of the training data: {error}") from error
            if earlier is not None and index == 0:
                # The first batch shows what sums there are; their values are those kept.
                data_pass.resume(sums.state, earlier[1])
                sums = Sums(sums.state, earlier[0].loss, earlier[0].n, earlier[0].batches)
                continue
            sums.loss, sums.n = sums.loss + loss.item(), sums.n + len(y)
            sums.batches = index + 1
            if snapshot is not None:
                snapshot.write(sums)
    if snapshot is not None:
        snapshot.write(sums, complete=True)
    return sums
