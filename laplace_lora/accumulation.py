"""Passes over training data that only add up: together with other processes, or in two sittings.

What is added belongs to the posterior classes; `fitting` makes a posterior of the sums.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from laplace_lora import sharding
from laplace_lora.checkpoint import write_whole
from laplace_lora.fingerprint import exact_fingerprint, identity
from laplace_lora.guard import evaluation_mode

DEFAULT_EVERY = 100  # batches


@dataclass(frozen=True)
class Pass:
    """What one pass over the data adds up.

    Attributes:
        add: From sums, ``None`` before the first batch, inputs and labels to the batch's loss and
            the sums with the batch.
        tensors: The tensors that sums consist of.
        name: Part of a snapshot's file name.
        title: What the progress bar says.
        basis: Tensors in whose terms the sums are; those of the main process, where several share
            a loader.
    """

    add: Callable[[Any, Any, Tensor], tuple[Tensor, Any]]
    tensors: Callable[[Any], list[Tensor]]
    name: str = "fit"
    title: str = "Fitting the posterior"
    basis: Sequence[Tensor] = ()

    def signature(self, state: Any) -> Any:
        """Return what must be equal in processes whose sums go together."""
        return [tuple(tensor.shape) for tensor in self.tensors(state)]

    def combine(self, state: Any) -> None:
        """Take in what the other processes have summed up."""
        sharding.add_up(self.tensors(state))

    def resume(self, state: Any, kept: Sequence[Tensor]) -> None:
        """Put what an interrupted pass had summed up in the place of a first batch's sums."""
        for tensor, value in zip(self.tensors(state), kept, strict=True):
            tensor.copy_(value)


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
        one: The pass whose sums are kept; the file belongs to its basis.

    Raises:
        ValueError: If ``every`` is not positive.
    """

    def __init__(
        self, folder: str | os.PathLike[str], every: int | None, la: Any, one: Pass
    ) -> None:
        self.every = DEFAULT_EVERY if every is None else every
        if self.every < 1:
            raise ValueError(f"checkpoint_every must be positive, got {every}")
        rank = torch.distributed.get_rank() if sharding.processes() > 1 else 0
        name = f"laplace_{one.name}_{rank}_of_{sharding.processes()}.safetensors"
        self.path = Path(folder) / name
        self.tensors = one.tensors
        basis = exact_fingerprint((str(i), tensor) for i, tensor in enumerate(one.basis))
        owner = [type(la).__name__, la.arguments(), identity(la), basis]
        self.owner = json.dumps(owner, sort_keys=True)

    def write(self, sums: Sums, complete: bool = False) -> None:
        """Write the sums, if it is time to.

        Args:
            sums: The sums so far.
            complete: Whether the pass has ended, after which it is always time.
        """
        due = sums.batches % self.every == 0  # at the end of a pass it has been written then
        if sums.state is None or due == complete:
            return
        tensors = {str(i): t.cpu() for i, t in enumerate(self.tensors(sums.state))}
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
