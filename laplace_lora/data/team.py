"""`Together`: one process's part in work that several share.

There is no collective but those of `Together`, each of which begins with an exchange of reports, so
that what one process raises, all hear of.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laplace_lora.data.batches import Batch
from laplace_lora.data.columns import in_order, joined_columns
from laplace_lora.data.messages import (
    OtherProcessFailed,
    ProcessLost,
    different_things,
    messages,
)
from laplace_lora.data.reading import Reading
from laplace_lora.data.shares import processes, share_of
from laplace_lora.data.tally import check_apart

T = TypeVar("T")


class Together:
    """One process's part in shared work; alone, every method returns what it is given.

    Args:
        shared: Whether other processes take part.
        device: Where a process without examples gets the others' rows.
        deals: Whether they see different data.
        crew: All processes, if each is to see what loaders deal out to any of them.

    Attributes:
        shared: As given.
        deals: As given.
        in_step: Whether a model runs in all processes together, see `steps`.
    """

    def __init__(
        self,
        shared: bool,
        device: torch.device | str = "cpu",
        deals: bool = False,
        crew: Together | None = None,
    ) -> None:
        self.shared = shared
        self.deals = deals
        self.in_step = False
        self._device = device
        self._crew = crew
        self._over = not shared
        self._readings: list[Reading] = []

    @property
    def rank(self) -> int:
        """This process's place among those that take part."""
        return dist.get_rank() if self.shared else 0

    def batches(
        self,
        loader: Iterable[Batch],
        title: str,
        progress_bar: bool | None = None,
        by_example: Callable[[Any], Any] | None = None,
        at_most: float = math.inf,
    ) -> Iterator[Any]:
        """Iterate over this process's share of a loader, without the examples that others count.

        Args:
            loader: Any loader; one that is not shared is iterated over as a whole.
            title: Title of the progress bar.
            progress_bar: Whether to show progress, see `progress`.
            by_example: From a batch to the form in which every row is an example.
            at_most: Stop when this process has had so many examples.

        Yields:
            Batches with at least one example, if the loader is shared.

        Raises:
            ValueError: If the workers of a stream each read all of it.
        """
        crew = self._crew or self
        share = share_of(loader) if crew.shared else None
        crew._exchange("batches")  # accelerate's loaders begin with a collective of their own
        options = (title, progress_bar, by_example, at_most)
        reading = Reading(loader, share, lambda value: crew._exchange("deal", value), *options)
        self._readings.append(reading)
        if self._crew is not None:
            crew._readings.append(reading)
        read = reading.batches if self._crew is None else reading.everyones_batches
        yield from read()

    def rows(self, **columns: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the rows of all processes, in the order of the data.

        Args:
            **columns: For each batch that was yielded, a tensor with a row per example. A column
                that another process lacks is left out.

        Returns:
            Each column's tensors joined, ``(examples, ...)``; nothing where there were no batches.

        Raises:
            ValueError: If the rows of batches differ in shape, as those of multiple-choice models
                do whose examples have different numbers of choices.
        """
        joined = joined_columns(columns)
        read = self._readings[-1].places if self._readings else None
        if read is None:
            return joined
        places = torch.cat(read) if read else torch.empty(0, dtype=torch.long)
        if not self.shared:  # this process has had everyone's
            return {name: column[places.argsort()] for name, column in joined.items()}
        local = {name: column.detach().cpu() for name, column in joined.items()}
        whole = in_order(self._exchange("rows", (local, places)))
        return {
            name: column.to(joined[name].device if name in joined else self._device)
            for name, column in whole.items()
        }

    def total(self, *values: float) -> list[float]:
        """Return sums of numbers over all processes."""
        reports = self._exchange("total", values)
        return [sum(column) for column in zip(*reports, strict=True)]

    def any_of(self, value: T | None) -> T | None:
        """Return the value of the first process that has one."""
        return next((v for v in self._exchange("value", value) if v is not None), None)

    def all_of(self, value: T) -> list[T]:
        """Return the values of all processes, in the order of their ranks."""
        return self._exchange("values", value)

    def longest(self, lengths: Iterable[int]) -> int:
        """Return the largest number of all processes'; zero where none has one."""
        return max(self.all_of(max(lengths, default=0)))

    def meet(self, step: str) -> None:
        """Wait until all processes are about to take a step, or raise if one is not."""
        self._exchange(step)

    def agree(self, signature: object) -> None:
        """Check that a value is the same in all processes.

        Raises:
            RuntimeError: If it is not.
        """
        for rank, other in enumerate(self._exchange("signature", signature)):
            if other != signature:
                self._over = True
                raise RuntimeError(
                    f"process {rank} sums different tensors than process {dist.get_rank()}"
                )

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in place."""
        if self.shared:
            self.agree([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
            for tensor in tensors:
                dist.all_reduce(tensor)

    def share_main(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by the main process's, in place."""
        if self.shared:
            self.agree([(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors])
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    @contextmanager
    def common_draws(self, device: torch.device | str, apart: bool) -> Iterator[None]:
        """Let all processes draw the same random numbers in this block.

        Args:
            device: Where numbers are drawn, beside the CPU.
            apart: Or numbers of their own, as they see different data.
        """
        seed = self.all_of(int(torch.randint(2**62, ())))[0] + apart * dist.get_rank()
        place = torch.device(device)
        with torch.random.fork_rng([place] if place.type == "cuda" else []):
            torch.manual_seed(seed)
            yield

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the rows of all processes in the order of their ranks, without a detour.

        For large tensors on the device of collectives.

        Args:
            tensor: Shape ``(rows, ...)``; the number of rows may differ between processes.
        """
        if not self.shared:
            return tensor
        lengths = self._exchange("lengths", len(tensor))
        # As bytes: not every backend knows every dtype.
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor
        raw = padded.flatten().view(torch.uint8)
        parts = [torch.empty_like(raw) for _ in lengths]
        self._exchange("gather")  # that all have the memory
        dist.all_gather(parts, raw)
        whole = [part.view(tensor.dtype).view_as(padded) for part in parts]
        return torch.cat([part[:length] for part, length in zip(whole, lengths, strict=True)])

    def end(self, error: Exception | None) -> None:
        """End the work: tell the others of an error, or hear of theirs; once.

        Raises:
            ValueError: If processes have read the same examples of a stream in different orders.
        """
        if not self._over:
            samples = self._exchange("end", [reading.sample for reading in self._readings], error)
            self._over = True
            if error is None:
                check_apart(samples)

    def _exchange(self, step: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        """Return what all processes give at a step, in the order of their ranks."""
        if not self.shared:
            return [value]
        if self._over:
            raise RuntimeError("the shared work is over")
        message = None if error is None else (type(error).__name__, str(error))
        blocks = shared_blocks()
        where = (blocks.index(self), step)
        reports: list[Any] = [None] * processes()
        try:
            dist.all_gather_object(reports, (where, message, value), group=messages())
        except RuntimeError as lost:
            _give_up(blocks)
            raise ProcessLost("another process has ended or cannot be reached") from lost
        failures = {rank: text for rank, (_, text, _) in enumerate(reports) if text is not None}
        places = [place for place, _, _ in reports]
        if failures or len(set(places)) > 1:
            # Another process may be in a block around this one, and has then ended that one, too.
            _give_up(blocks[min(depth for depth, _ in places) :])
            if failures and error is None:
                rank = min(failures)
                raise OtherProcessFailed(rank, failures[rank])
            if error is None:
                raise RuntimeError(different_things([other for _, other in places]))
        return [value for _, _, value in reports]


ALONE = Together(shared=False)
_LOCAL = threading.local()


def shared_blocks() -> list[Together]:
    """Return the blocks of shared work that this thread is in, the outermost first."""
    if not hasattr(_LOCAL, "blocks"):
        _LOCAL.blocks = []
    blocks: list[Together] = _LOCAL.blocks
    return blocks


def _give_up(blocks: list[Together]) -> None:
    for block in blocks:
        block._over = True
