"""One pass over training data that only adds up: together with other processes, or in two sittings.

What is added belongs to the posterior classes; `fitting` makes a posterior of the sums.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from laplace_lora import sharding
from laplace_lora.checkpoint import write_whole
from laplace_lora.fingerprint import identity
from laplace_lora.guard import evaluation_mode

DEFAULT_EVERY = 100  # batches


@dataclass
class Sums:
    """What a pass has added up.

    Attributes:
        state: Sums of the curvature, ``None`` before the first batch.
        loss: Summed loss.
        n: Number of examples.
        batches: Number of batches.
    """

    state: Any = None
    loss: float = 0.0
    n: int = 0
    batches: int = 0


class Snapshot:
    """The sums so far in a file, so that an interrupted pass can go on.

    Args:
        folder: Where the file is kept, one a process.
        every: Batches from one writing to the next.
        la: The posterior that is being fitted; the file belongs to its weights and arguments.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int | None, la: Any) -> None:
        self.every = DEFAULT_EVERY if every is None else every
        if self.every < 1:
            raise ValueError(f"checkpoint_every must be positive, got {every}")
        rank = torch.distributed.get_rank() if sharding.processes() > 1 else 0
        self.path = Path(folder) / f"laplace_fit_{rank}_of_{sharding.processes()}.safetensors"
        self.la = la
        self.owner = json.dumps([type(la).__name__, la.arguments(), identity(la)], sort_keys=True)

    def write(self, sums: Sums) -> None:
        """Write the sums, if it is time to."""
        if sums.batches % self.every:
            return
        tensors = {str(i): t.cpu() for i, t in enumerate(self.la._tensors(sums.state))}
        numbers = {"loss": sums.loss.hex(), "n": str(sums.n), "batches": str(sums.batches)}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, save(tensors, metadata={**numbers, "owner": self.owner}))

    def read(self) -> tuple[Sums, list[torch.Tensor]] | None:
        """Return what an interrupted pass had added up, and its tensors; ``None`` if there is none.

        Raises:
            ValueError: If the file is damaged, or belongs to another model or to other arguments.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, "pt") as file:
                numbers = file.metadata() or {}
                tensors = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
            sums = Sums(
                None, float.fromhex(numbers["loss"]), int(numbers["n"]), int(numbers["batches"])
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged ({error}); delete it to start anew") from None
        if numbers["owner"] != self.owner:
            raise ValueError(
                f"{self.path} belongs to a fit of another model or with other arguments; delete it "
                "to start anew"
            )
        return sums, tensors

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)


def accumulate(la: Any, loader: Any, progress_bar: bool, snapshot: Snapshot | None) -> Sums:
    """Add up a loader's batches, those of all processes that share it.

    Args:
        la: A posterior; its ``_add`` adds a batch, its ``_tensors`` names what the sums consist of.
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
    try:
        sums = _own_sums(la, loader, progress_bar and sharding.is_main(), snapshot)
        if sums.state is None and not shared:
            raise ValueError("the training loader is empty")
    except Exception as error:
        if not shared:
            raise
        failure = error  # the other processes must hear of it, or they would wait for ever
    if shared:
        sharding.agree(failure, None if sums.state is None else la._signature(sums.state))
        la._combine(sums.state)
        totals = torch.tensor([sums.loss, sums.n], dtype=torch.float64, device=la._device)
        sharding.add_up([totals])
        sums.loss, sums.n = totals[0].item(), int(totals[1].item())
    return sums


def _own_sums(la: Any, loader: Any, progress_bar: bool, snapshot: Snapshot | None) -> Sums:
    earlier = None if snapshot is None else snapshot.read()
    sums = Sums()
    bar = tqdm(loader, disable=not progress_bar, desc="Fitting the posterior")
    with evaluation_mode(la.model):
        batches = sharding.own_batches(loader, map(la.by_example, bar))
        for index, batch in enumerate(batches):
            if earlier is not None and 0 < index < earlier[0].batches:
                continue
            x, y = la.labelled(batch)
            try:
                loss, sums.state = la._add(sums.state, x, y)
            except FloatingPointError as error:
                raise FloatingPointError(f"batch {index} of the training data: {error}") from error
            if earlier is not None and index == 0:
                # The first batch shows what sums there are; their values are those kept.
                la._resume(sums.state, earlier[1])
                sums = Sums(sums.state, earlier[0].loss, earlier[0].n, earlier[0].batches)
                continue
            sums.loss, sums.n = sums.loss + loss.item(), sums.n + len(y)
            sums.batches = index + 1
            if snapshot is not None:
                snapshot.write(sums)
    return sums
