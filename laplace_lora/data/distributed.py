"""`together`: work that several processes share, from which all return or none does.

A process that fails alone would leave the others waiting in their next collective. So there is no
collective but those of `Together`, each of which begins with an exchange of reports, and the block
ends with one more: what one process raises, all hear of.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from laplace_lora.data.batches import Batch
from laplace_lora.data.loaders import progress
from laplace_lora.data.messages import messages
from laplace_lora.data.shares import is_sharded, processes, share_of

T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """Another process failed; this one ends with it.

    Args:
        rank: Which process.
        error: What it raised.

    Attributes:
        kind: Name of the error's class.
    """

    def __init__(self, rank: int, error: tuple[str, str]) -> None:
        super().__init__(f"process {rank} failed: {': '.join(error)}")
        self.kind = error[0]


class ProcessLost(RuntimeError):
    """Another process has ended, or cannot be reached."""


@contextmanager
def together(
    *loaders: object, everyone: bool = False, device: torch.device | str = "cpu"
) -> Iterator[Together]:
    """Share work with the other processes, where they share a loader.

    However a process leaves the block, all leave it: with their results, or with an error each. A
    process that was killed silently (e.g. out of memory) is noticed at once, as reports go through
    gloo, see `messages`. Nothing is exchanged where no loader is shared.

    Args:
        *loaders: What the work iterates over, see `share_of`.
        everyone: All processes take part, whatever the loaders.
        device: Where a process without examples gets the others' rows.

    Raises:
        OtherProcessFailed: If another process failed.
        ProcessLost: If another process has ended.
        RuntimeError: If the processes do different things.
        TypeError: As `share_of`.
    """
    deals = any(map(is_sharded, loaders))
    team = Together((everyone and processes() > 1) or deals, device, deals)
    shared = team.shared
    blocks = _blocks()
    if shared:
        blocks.append(team)
    try:
        yield team
        team.end(None)
    except ProcessLost:
        raise
    except Exception as error:
        team.end(error)
        raise
    finally:
        if shared:
            blocks.remove(team)


class Together:
    """One process's part in shared work; alone, every method returns what it is given.

    Args:
        shared: Whether other processes take part.
        device: Where a process without examples gets the others' rows.
        deals: Whether they see different data.

    Attributes:
        shared: As given.
        deals: As given.
    """

    def __init__(
        self, shared: bool, device: torch.device | str = "cpu", deals: bool = False
    ) -> None:
        self.shared = shared
        self.deals = deals
        self._device = device
        self._over = not shared
        self._places: list[Tensor] | None = None  # of a shared loader's examples

    def batches(
        self,
        loader: Iterable[Batch],
        title: str,
        progress_bar: bool = False,
        by_example: Callable[[Any], Any] | None = None,
    ) -> Iterator[Any]:
        """Iterate over this process's share of a loader, without the examples that others count.

        Args:
            loader: Any loader; one that is not shared is iterated over as a whole.
            title: Title of the progress bar.
            progress_bar: Show progress, in the main process.
            by_example: From a batch to the form in which every row is an example.

        Yields:
            Batches with at least one example, if the loader is shared.
        """
        share = share_of(loader) if self.shared else None
        self._places = None
        self._exchange("batches")  # accelerate's loaders begin with a collective of their own
        bar = progress(loader, progress_bar, title)
        examples = bar if by_example is None else map(by_example, bar)
        if share is None:
            yield from examples
            return
        self._places = read = []
        for batch, places in share.of(examples):
            read.append(places)
            yield batch

    def rows(self, **columns: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the rows of all processes, in the order of the data.

        Args:
            **columns: For each batch that was yielded, a tensor with a row per example. A column
                that another process lacks is left out.

        Returns:
            Each column's tensors joined, ``(examples, ...)``; nothing where there were no batches.
        """
        joined = {name: torch.cat(list(parts)) for name, parts in columns.items() if parts}
        if self._places is None:
            return joined
        local = {name: column.detach().cpu() for name, column in joined.items()}
        places = torch.cat(self._places) if self._places else torch.empty(0, dtype=torch.long)
        reports = [r for r in self._exchange("rows", (local, places)) if len(r[1])]
        if not reports:
            return {}
        names = [n for n in reports[0][0] if all(n in report for report, _ in reports)]
        order = torch.cat([places for _, places in reports]).argsort()
        return {
            name: torch.cat([report[name] for report, _ in reports])[order].to(
                joined[name].device if name in joined else self._device
            )
            for name in names
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
        """End the work: tell the others of an error, or hear of theirs; once."""
        if not self._over:
            self._exchange("end", error=error)
            self._over = True

    def _exchange(self, step: str, value: Any = None, error: Exception | None = None) -> list[Any]:
        """Return what all processes give at a step, in the order of their ranks."""
        if not self.shared:
            return [value]
        if self._over:
            raise RuntimeError("the shared work is over")
        message = None if error is None else (type(error).__name__, str(error))
        blocks = _blocks()
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
                steps = [f"process {rank}: {other}" for rank, (_, other) in enumerate(places)]
                raise RuntimeError(f"the processes do different things ({', '.join(steps)})")
        return [value for _, _, value in reports]


ALONE = Together(shared=False)
_LOCAL = threading.local()


def _blocks() -> list[Together]:
    """Return the blocks of shared work that this thread is in, the outermost first."""
    if not hasattr(_LOCAL, "blocks"):
        _LOCAL.blocks = []
    blocks: list[Together] = _LOCAL.blocks
    return blocks


def _give_up(blocks: list[Together]) -> None:
    for block in blocks:
        block._over = True


def deals_data_out() -> bool:
    """Return whether this thread is in shared work in which processes see different data."""
    return any(block.deals for block in _blocks())
