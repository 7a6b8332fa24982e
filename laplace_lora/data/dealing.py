"""Loaders that accelerate fills up with repeats: what stands behind them, for the main process.

Accelerate repeats examples of a stream until all processes have equally many. Here the main process
reads what accelerate would have read, and deals its batches out, so that nothing is repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from laplace_lora.data.batches import Batch, batch_length, some_examples

HOW = (  # arguments that say how a loader reads, not what
    "num_workers",
    "collate_fn",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
)

Source = Callable[[], Iterable[Batch]]


def loader_like(loader: Any, dataset: Any, **what: Any) -> DataLoader[Any]:
    """Return a loader that reads as another one does.

    Args:
        loader: The other one.
        dataset: The data.
        **what: Arguments that say which examples are in a batch.
    """
    return DataLoader(dataset, **{name: getattr(loader, name) for name in HOW}, **what)


def source_of(loader: Any, count: int) -> Source | None:
    """Return what the main process reads of a loader, ``None`` if each process reads its own.

    Args:
        loader: Any loader; accelerate need not be installed.
        count: How many processes there are.

    Returns:
        What begins a pass over the batches behind the loader.
    """
    if type(loader).__name__ == "DataLoaderDispatcher":
        behind, is_split = loader.base_dataloader, bool(loader.split_batches)
    elif type(getattr(loader, "dataset", None)).__name__ == "IterableDatasetShard":
        whole = {"batch_size": loader.batch_size, "drop_last": loader.drop_last}
        behind, is_split = loader_like(loader, loader.dataset.dataset, **whole), False
    else:
        return None
    skipped = getattr(loader, "skip_batches", 0) * (1 if is_split else count)

    def batches() -> Iterator[Batch]:
        whole = islice(iter(behind), skipped, None)
        return _pieces(whole, count) if is_split else whole

    return batches


def _pieces(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Yield each batch in as many pieces as there are processes, or fewer."""
    for batch in batches:
        size = batch_length(batch)
        step = -(-size // count)
        for start in range(0, size, step):
            yield some_examples(batch, range(start, min(start + step, size)))


def dealt_out(
    batches: Iterator[Batch],
    at_most: float,
    rank: int,
    count: int,
    exchange: Callable[[Any], list[Any]],
) -> Iterator[Batch]:
    """Yield this process's part of what the main process reads for all, round by round.

    Args:
        batches: All batches, in the main process; elsewhere none.
        at_most: Examples that this process wants; reading ends when all have had theirs.
        rank: Which process this is.
        count: How many there are.
        exchange: From a value to those of all processes.
    """
    seen = 0
    while True:
        wanted = seen < at_most
        reports = exchange((list(islice(batches, count)), wanted))
        dealt: list[Batch] = reports[0][0]
        if rank < len(dealt) and wanted:
            seen += batch_length(dealt[rank])
            yield dealt[rank]
        if len(dealt) < count or not any(wanted for _, wanted in reports):
            return
