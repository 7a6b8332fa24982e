"""Iterate over loaders with a progress bar."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from tqdm.auto import tqdm

from laplace_lora.data.batches import Batch, batch_length
from laplace_lora.data.shares import is_main

T = TypeVar("T")


def progress(
    items: Iterable[T], shown: bool, title: str, loader: Iterable[T] | None = None
) -> Iterable[T]:
    """Wrap an iterable in a progress bar, which has no end where the length is not known.

    Args:
        items: The iterable.
        shown: Whether to show the bar; only the main process does.
        title: Title of the bar.
        loader: What the items are of, if they have no length themselves.
    """
    total = None
    with suppress(TypeError, AttributeError, NotImplementedError):  # a stream has no length
        total = len(items if loader is None else loader)  # type: ignore[arg-type]
    bar: Iterable[T] = tqdm(items, disable=not (shown and is_main()), desc=title, total=total)
    return bar


def workers_of(loader: object) -> int:
    """Return how many processes read for a loader, 0 if it reads by itself."""
    workers: int = getattr(loader, "num_workers", 0)
    return workers


def until(batches: Iterable[Batch], at_most: float) -> Iterator[Batch]:
    """Yield batches until there have been so many examples."""
    seen = 0
    for batch in batches:
        yield batch
        if at_most < math.inf:
            seen += batch_length(batch)
        if seen >= at_most:
            return
