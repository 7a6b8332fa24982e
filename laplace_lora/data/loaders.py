"""Iterate over loaders: with a progress bar, and over each process's share of the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from tqdm.auto import tqdm

from laplace_lora.data.batches import Batch
from laplace_lora.data.distributed import is_main, without_repeats

T = TypeVar("T")


def progress(items: Iterable[T], shown: bool, title: str) -> Iterable[T]:
    """Wrap an iterable in a progress bar.

    Args:
        items: The iterable.
        shown: Whether to show the bar; only the main process does.
        title: Title of the bar.
    """
    bar: Iterable[T] = tqdm(items, disable=not (shown and is_main()), desc=title)
    return bar


def local_batches(
    loader: Iterable[Batch],
    title: str,
    progress_bar: bool = False,
    by_example: Callable[[Batch], Batch] | None = None,
) -> Iterator[Batch]:
    """Iterate over this process's share of a loader, without the examples that others count.

    Args:
        loader: Any loader; one that is not sharded is iterated over as a whole.
        title: Title of the progress bar.
        progress_bar: Show progress, in the main process.
        by_example: From a batch to the form in which every row is an example.

    Yields:
        Batches with at least one example.
    """
    bar = progress(loader, progress_bar, title)
    return without_repeats(loader, bar if by_example is None else map(by_example, bar))
