"""Which of a loader's examples are this process's, and where they stand in the data.

Loaders with a `torch.utils.data.DistributedSampler` and accelerate's loaders repeat examples so
that all processes see equally many; the repeats are left out. Of a stream, where nothing says which
example is whose, accelerate's loaders are read by the main process, see `dealing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler

from laplace_lora.data.batches import Batch, batch_length, first_examples, is_joined
from laplace_lora.data.dealing import Source, source_of
from laplace_lora.data.order import samplers_of
from laplace_lora.data.streams import is_dealt, is_stream

SKIPPED = "skip_batches"  # of accelerate's loaders and samplers: how many they leave out at first
PER_BATCH = 2**32  # places kept for the examples of one batch of unknown size

Places = Callable[[int, int, int], Tensor]


@dataclass(frozen=True)
class Share:
    """How a loader deals the data out to processes.

    Attributes:
        places: From the index of a batch of this process, the number of examples in its earlier
            ones and the number in this one to the examples' places in the data, ascending.
        total: Places from here on are repeats; ``None`` where there are none.
        source: Batches that the main process reads and deals out to all in turn; ``None`` where
            each process reads its own.
        says_so: Whether the loader says whose its examples are, so that this need not be checked.
        most: How many examples a batch may have; ``None`` for any number.
    """

    places: Places
    total: int | None
    source: Source | None = None
    says_so: bool = True
    most: int | None = None

    def counted(self, index: int, seen: int, size: int) -> Tensor:
        """Return the places of a batch's first examples, without the repeats at its end."""
        places = self.places(index, seen, size)
        return places if self.total is None else places[places < self.total]

    def of(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield this process's batches without repeats, and the places of their examples.

        Args:
            batches: What the loader gives this process, each row an example.

        Yields:
            Batches with at least one example.

        Raises:
            ValueError: If repeats cannot be told apart: a batch has its examples joined in one row,
                or more of them than items were dealt out for it.
        """
        seen = 0
        for index, batch in enumerate(batches):
            if is_joined(batch):
                raise ValueError(
                    "processes cannot share batches whose examples are joined in one row (packing, "
                    "padding-free collators): repeats cannot be told apart; use a collator that "
                    "pads, or one process"
                )
            size = batch_length(batch)
            if self.most is not None and size > self.most:
                raise ValueError(
                    f"the loader deals out {self.most} items of the data for a batch, and one has "
                    f"{size} examples, so repeats cannot be told apart. If an item is a batch, "
                    "make the loader with batch_size=None; else deal out single examples, or give "
                    "every process all the data"
                )
            places = self.counted(index, seen, size)
            seen += size
            if len(places):
                yield batch if len(places) == size else first_examples(batch, len(places)), places


def processes() -> int:
    """Return the number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that shows progress."""
    return processes() == 1 or dist.get_rank() == 0


def share_of(loader: object) -> Share | None:
    """Return this process's share of a loader, ``None`` if each process has all the data.

    Raises:
        TypeError: If repeats cannot be told apart: accelerate evens out batches of a sampler
            without a length; the data are dealt out to another number of processes; or a sampler of
            another kind changes what is dealt out.
        RuntimeError: If processes have not compared what they read of a stream.
    """
    if processes() == 1:
        return None
    found = source_of(loader, processes())
    if found is not None:
        return Share(_by_batch(processes(), dist.get_rank()), None, found)
    if is_stream(loader):
        return _of_stream(loader)
    around: list[Any] = [loader]
    for sampler in samplers_of(loader):
        if isinstance(sampler, DistributedSampler):
            if _gives_ready_batches(loader, around):
                return _remaining(_of_sampler(sampler, None, in_batches=True), around, 0)
            size = getattr(around[-1], "batch_size", None)
            return _remaining(_of_sampler(sampler, size), around, size)
        if type(sampler).__name__ == "BatchSamplerShard":  # accelerate need not be installed
            return _remaining(_of_shard(sampler), around, 0)
        around.append(sampler)
    return None


def needs_comparison(loader: object) -> bool:
    """Return whether only the examples of a stream tell if processes read different ones."""
    if processes() == 1 or not is_stream(loader) or source_of(loader, processes()) is not None:
        return False
    return _split_by_node(loader) is None and is_dealt(loader) is None


def _split_by_node(stream: Any) -> Any:
    """Return how Hugging Face's `split_dataset_by_node` has divided a stream, if it has."""
    return getattr(stream.dataset, "_distributed", None)


def _of_stream(stream: Any) -> Share | None:
    split = _split_by_node(stream)
    dealt = is_dealt(stream) if split is None else _is_for_all(split.world_size)
    if dealt is None:
        raise RuntimeError("processes have not compared what they read of the stream")
    if not dealt:
        return None
    return Share(_in_turn(processes(), dist.get_rank()), None, says_so=False)


def _in_turn(count: int, rank: int) -> Places:
    """Return the places of examples that processes take in turn."""
    return lambda index, seen, size: torch.arange(seen, seen + size) * count + rank


def _by_batch(count: int, rank: int, most: int = PER_BATCH) -> Places:
    """Return the places in batches of at most so many examples, which processes take in turn."""
    return lambda index, seen, size: (index * count + rank) * most + torch.arange(size)


def _gives_ready_batches(loader: Any, around: Sequence[Any]) -> bool:
    """Return whether a place that the sampler inside ``around`` gives is that of a whole batch."""
    if getattr(loader, "batch_size", 0) is not None:
        return False
    if getattr(loader, "batch_sampler", None) is not None:
        return False
    return all(each is None or hasattr(each, SKIPPED) for each in around[1:])


def _of_sampler(
    sampler: DistributedSampler[Any], most: int | None, in_batches: bool = False
) -> Share | None:
    if not _is_for_all(sampler.num_replicas):
        return None
    data: Any = sampler.dataset
    rank, count = sampler.rank, sampler.num_replicas
    total = len(data) if sampler.total_size > len(data) else None
    if in_batches:  # repeated as wholes
        return Share(_by_batch(count, rank), None if total is None else total * PER_BATCH)
    return Share(_in_turn(count, rank), total, most=most)


def _of_shard(shard: Any) -> Share | None:
    count, rank, whole = shard.num_processes, shard.process_index, shard.batch_size
    if not _is_for_all(count):
        return None
    batches = shard.batch_sampler
    most = whole // count if shard.split_batches else whole
    places = _by_batch(count, rank, PER_BATCH if most is None else most)
    if not shard.even_batches:
        return Share(places, None, most=most)
    if most is None:  # batches of any size, repeated as wholes
        return Share(places, len(batches) * PER_BATCH)
    if not hasattr(batches, "sampler"):
        raise TypeError(
            f"accelerate repeats batches of {type(batches).__name__}, which cannot be told apart; "
            "prepare the loader with DataLoaderConfiguration(even_batches=False)"
        )
    return Share(places, len(batches.sampler), most=most)


def _keeps_order(sampler: Any) -> bool:
    """Return whether a sampler cuts what it is given into batches, in their order."""
    is_plain = getattr(type(sampler), "__iter__", None) is BatchSampler.__iter__
    return is_plain and not hasattr(sampler, "batch_sampler")


def _remaining(share: Share | None, around: Sequence[Any], size: int | None) -> Share | None:
    """Return a share less the batches that are skipped, as by accelerate's `skip_first_batches`.

    Args:
        share: What a sampler deals out to this process.
        around: The loader, and its samplers down to that one.
        size: How many examples a skipped batch has; 0 if places do not depend on it.

    Raises:
        TypeError: If it cannot be told which examples remain.
    """
    skipped: int = sum(getattr(each, SKIPPED, 0) for each in around)
    if share is None:
        return None
    kinds = ["batch_sampler"]
    if skipped or share.total is not None:  # which must be the first and last of what is dealt out
        kinds.append("sampler")
    others = [s for s in around[1:] if any(hasattr(s, kind) for kind in kinds)]
    others = [s for s in others if not _keeps_order(s) and not hasattr(s, SKIPPED)]
    if others or (skipped and size is None):
        raise TypeError(
            f"{type((others or around)[-1]).__name__} may change the batches that the loader deals "
            "out, so which examples each process has cannot be told; make batches by "
            "torch.utils.data.BatchSampler, of a torch.utils.data.Subset of the data if some are "
            "left out, or give every process all of them"
        )
    if size is None or not skipped:
        return share
    places, examples = share.places, skipped * size
    return replace(share, places=lambda i, seen, n: places(i + skipped, seen + examples, n))


def _is_for_all(count: int) -> bool:
    """Return whether data are dealt out to all processes, rather than given to each.

    Raises:
        TypeError: If they are dealt out to some.
    """
    if count not in (1, processes()):
        raise TypeError(
            f"the loader deals its data out to {count} processes, but there are {processes()}"
        )
    return count > 1
