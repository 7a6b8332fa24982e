"""Iterate over sharded data without counting duplicates, and combine results across processes.

Loaders with a `torch.utils.data.DistributedSampler` and accelerate's loaders repeat examples so
that all processes see equally many; the repeats are left out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DistributedSampler

from laplace_lora.data.batches import Batch, batch_length, first_examples

LocalCount = Callable[[int, int, int], int]


def processes() -> int:
    """Return the number of processes that share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_main() -> bool:
    """Return whether this is the process that shows progress."""
    return processes() == 1 or dist.get_rank() == 0


def is_sharded(loader: object) -> bool:
    """Return whether a loader gives each process different examples.

    Raises:
        TypeError: If accelerate dispatches batches from the main process, whose repeats cannot be
            told apart.
    """
    return processes() > 1 and _local_count(loader) is not None


def without_repeats(
    loader: Iterable[Batch], batches: Iterable[Batch] | None = None
) -> Iterator[Batch]:
    """Yield a loader's batches without the examples that another process counts.

    Args:
        loader: Any loader; the batches of one that is not sharded are yielded unchanged.
        batches: The loader in a wrapper, such as a progress bar; ``None`` for the loader itself.
    """
    local_count = _local_count(loader) if processes() > 1 else None
    seen = 0
    for index, batch in enumerate(loader if batches is None else batches):
        if local_count is None:
            yield batch
            continue
        size = batch_length(batch)
        count = max(0, min(local_count(index, seen, size), size))
        seen += size
        if count:
            yield batch if count == size else first_examples(batch, count)


def agree(error: BaseException | None, signature: object) -> None:
    """Let all processes continue together, or fail together.

    A process that was killed silently (e.g. out of memory) is noticed by gloo at once; NCCL waits
    for the timeout of its process group.

    Args:
        error: The error raised in this process, if any.
        signature: Must be equal in all processes; ``None`` where a process had no data.

    Raises:
        BaseException: The error of this process.
        RuntimeError: If another process failed, had no data, has a different signature, or ended.
    """
    if processes() == 1:
        if error is not None:
            raise error
        return
    reports: list[Any] = [None] * processes()
    message = None if error is None else f"{type(error).__name__}: {error}"
    try:
        dist.all_gather_object(reports, (message, signature))
    except RuntimeError as lost:
        raise RuntimeError("another process has ended or cannot be reached") from lost
    if error is not None:
        raise error
    for rank, (text, _) in enumerate(reports):
        if text is not None:
            raise RuntimeError(f"process {rank} failed: {text}")
    for rank, (_, other) in enumerate(reports):
        if other is None:
            raise RuntimeError(f"process {rank} got no examples; use fewer processes")
    for rank, (_, other) in enumerate(reports):
        if other != signature:
            raise RuntimeError(
                f"process {rank} sums different tensors than process {dist.get_rank()}"
            )


def add_up(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their sums over all processes, in place."""
    for tensor in tensors:
        dist.all_reduce(tensor)


def gather_for(loader: object) -> Callable[[Tensor], Tensor]:
    """Return a function from this process's rows to those of all processes.

    It takes ``(rows, ...)``; the number of rows may differ between processes.

    Args:
        loader: Source of the rows; if it is not sharded the function changes nothing.
    """
    return gather if is_sharded(loader) else lambda tensor: tensor


def common(tensor: Tensor) -> Tensor:
    """Return the main process's tensor in all processes."""
    if processes() > 1:
        dist.broadcast(tensor, 0)
    return tensor


def gather(tensor: Tensor) -> Tensor:
    """Return the rows of all processes, ``(rows, ...)``, in the order of their ranks."""
    lengths: list[Any] = [None] * processes()
    dist.all_gather_object(lengths, len(tensor))
    padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _local_count(loader: object) -> LocalCount | None:
    """Return how many examples of a batch this process counts, ``None`` without sharding.

    The function takes the index of the batch, the number of examples in earlier batches, and the
    number in this one.
    """
    if type(loader).__name__ == "DataLoaderDispatcher":
        raise TypeError(
            "accelerate dispatches this loader's batches from the main process and repeats some; "
            "prepare it with DataLoaderConfiguration(dispatch_batches=False)"
        )
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        data: Any = sampler.dataset
        n, replicas, rank = len(data), sampler.num_replicas, sampler.rank
        local = len(range(rank, n, replicas))
        return lambda index, seen, size: size if sampler.drop_last else local - seen
    shard: Any = getattr(loader, "batch_sampler", None)  # accelerate need not be installed
    if type(shard).__name__ != "BatchSamplerShard":
        return None
    n, rank, count = len(shard.batch_sampler.sampler), shard.process_index, shard.num_processes
    whole = shard.batch_sampler.batch_size
    if not shard.even_batches:
        return lambda index, seen, size: size
    if shard.split_batches:
        return lambda index, seen, size: n - index * whole - rank * (whole // count)
    return lambda index, seen, size: n - (index * count + rank) * whole
