"""Iterate over training data and add it up, across processes, or resumed after an interruption."""

from __future__ import annotations

from typing import Any

import torch
from tqdm.auto import tqdm

from laplace_lora.data import distributed as sharding
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.fitting.snapshots import Snapshot
from laplace_lora.models.modes import evaluation_mode


def accumulate(
    la: Any, one: Pass, loader: Any, progress_bar: bool, snapshot: Snapshot | None
) -> Sums:
    """Add up a loader's batches, those of all processes that share it.

    Args:
        la: A posterior; it splits batches into inputs and labels.
        one: What the pass adds up.
        loader: Batches with labels.
        progress_bar: Show progress, in the main process.
        snapshot: Where sums are kept on the way, ``None`` for nowhere.

    Raises:
        ValueError: If the loader is empty, labels are missing or out of range, or a snapshot does
            not belong to this fit.
        FloatingPointError: If the loss or the curvature is not finite; names batch and layer.
        RuntimeError: If another process that shares the loader failed or had no examples.
    """
    shared = sharding.is_sharded(loader)
    sums, failure = Sums(), None
    if shared:
        for tensor in one.basis:
            sharding.common(tensor)
    try:
        sums = _own_sums(la, one, loader, progress_bar and sharding.is_main(), snapshot)
        if sums.state is None and not shared:
            raise ValueError("the training loader is empty")
    except Exception as error:
        if not shared:
            raise
        failure = error  # the other processes must hear of it, or they would wait for ever
    if shared:
        sharding.agree(failure, None if sums.state is None else one.signature(sums.state))
        one.combine(sums.state)
        totals = torch.tensor([sums.loss, sums.n], dtype=torch.float64, device=la._device)
        sharding.add_up([totals])
        sums.loss, sums.n = totals[0].item(), int(totals[1].item())
    return sums


def _own_sums(
    la: Any, one: Pass, loader: Any, progress_bar: bool, snapshot: Snapshot | None
) -> Sums:
    earlier = None if snapshot is None else snapshot.read()
    sums = Sums()
    bar = tqdm(loader, disable=not progress_bar, desc=one.title)
    with evaluation_mode(la.model):
        batches = sharding.own_batches(loader, map(la.by_example, bar))
        for index, batch in enumerate(batches):
            if earlier is not None and 0 < index < earlier[0].batches:
                continue
            x, y = la.labelled(batch)
            try:
                loss, sums.state = one.add(sums.state, x, y)
            except FloatingPointError as error:
                raise FloatingPointError(f"batch {index} of the training data: {error}") from error
            if earlier is not None and index == 0:
                # The first batch shows what sums there are; their values are those kept.
                one.resume(sums.state, earlier[1])
                sums = Sums(sums.state, earlier[0].loss, earlier[0].n, earlier[0].batches)
                continue
            sums.loss, sums.n = sums.loss + loss.item(), sums.n + len(y)
            sums.batches = index + 1
            if snapshot is not None:
                snapshot.write(sums)
    if snapshot is not None:
        snapshot.write(sums, complete=True)
    return sums
