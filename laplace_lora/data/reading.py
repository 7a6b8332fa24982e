"""One pass over a loader, as one of the processes that share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import filterfalse
from typing import Any

import torch.distributed as dist
from torch import Tensor

from laplace_lora.data import streams
from laplace_lora.data.batches import Batch, is_empty, on_cpu
from laplace_lora.data.dealing import dealt_out
from laplace_lora.data.loaders import progress, until
from laplace_lora.data.shares import Share, is_main, processes
from laplace_lora.data.tally import Sample, counted_once


@dataclass
class Reading:
    """One process's pass over a loader, see `Together.batches` for what is not said here.

    Attributes:
        share: This process's share of the loader, ``None`` if it reads everything.
        exchange: From a value to those of all processes.
        places: Of the examples that were yielded, batch by batch; ``None`` if it reads everything.
        sample: Of what was read of a stream, when all of it has been read; ``None`` where the
            loader itself says whose its examples are.
    """

    loader: Any
    share: Share | None
    exchange: Callable[[Any], list[Any]]
    title: str
    progress_bar: bool | None
    by_example: Callable[[Any], Any] | None
    at_most: float
    places: list[Tensor] | None = field(init=False)
    sample: Sample | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.places = None if self.share is None else []
        self._workers: int = getattr(self.loader, "num_workers", 0)

    def batches(self) -> Iterator[Any]:
        """Yield this process's batches."""
        yield from self._own(self.at_most, self.places)

    def _own(self, at_most: float, taken: list[Tensor] | None) -> Iterator[Any]:
        share = self.share
        is_dealt = share is not None and share.source is not None
        batches = self._dealt(at_most) if is_dealt else self._local()
        examples = batches if self.by_example is None else map(self.by_example, batches)
        if share is None or taken is None:
            kept: Iterator[Any] = filterfalse(is_empty, examples)
        else:
            kept = _kept(share, examples, taken)
        # What is dealt out ends for all processes in the same round.
        yield from until(kept, math.inf if is_dealt else at_most)

    def everyones_batches(self) -> Iterator[Any]:
        """Yield the batches of all processes, the same in all of them, round by round.

        Which is not the order of the data: that is in `places`.
        """
        own: list[Tensor] = []
        batches = self._own(math.inf, own)
        if self.places is not None:
            yield from until(self._exchanged(batches, own, self.places), self.at_most)
            return
        for batch in until(batches, self.at_most):
            self.exchange(None)  # who cannot go on says so before the model's own collectives
            yield batch

    def _exchanged(
        self, batches: Iterator[Any], own: list[Tensor], taken: list[Tensor]
    ) -> Iterator[Any]:
        while True:
            batch = next(batches, None)
            reports = self.exchange(None if batch is None else (on_cpu(batch), own[-1]))
            dealt = [report for report in reports if report is not None]
            if not dealt:
                return
            for each, places in sorted(dealt, key=lambda item: int(item[1][0])):
                taken.append(places)
                yield each

    def _local(self) -> Iterator[Batch]:
        """Return what the loader gives this process."""
        bar = progress(streams.begun(self.loader), self.progress_bar, self.title, self.loader)
        must_be_part = self.share is not None and not self.share.says_so
        if not streams.is_stream(self.loader) or not (must_be_part or self._workers > 1):
            return iter(bar)

        def keep(sample: Sample) -> None:
            self.sample = sample if must_be_part else None

        return counted_once(bar, self._workers, keep)

    def _dealt(self, at_most: float) -> Iterator[Batch]:
        """Return this process's part of what the main process reads for all."""
        assert self.share is not None and self.share.source is not None
        batches: Iterator[Batch] = iter(())
        if is_main():
            batches = iter(progress(self.share.source(), self.progress_bar, self.title))
            if streams.is_stream(self.loader) and self._workers > 1:
                batches = counted_once(batches, self._workers)
        return dealt_out(batches, at_most, dist.get_rank(), processes(), self.exchange)


def _kept(share: Share, examples: Iterator[Batch], taken: list[Tensor]) -> Iterator[Batch]:
    for batch, places in share.of(examples):
        taken.append(places)
        yield batch
