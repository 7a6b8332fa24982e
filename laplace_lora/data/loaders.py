"""Iterate over loaders with a progress bar."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

from tqdm.auto import tqdm

from laplace_lora.data.batches import Batch, batch_length
from laplace_lora.data.shares import is_main

T = TypeVar("T")
DELAY = 2.0  # seconds after which a bar appears that nobody asked for
VARIABLE = "LAPLACE_LORA_PROGRESS"
OFF = ("0", "false", "no", "off")


def progress(
    items: Iterable[T], shown: bool | None, title: str, loader: Iterable[T] | None = None
) -> Iterable[T]:
    """Wrap an iterable in a progress bar, which has no end where the length is not known.

    Args:
        items: The iterable.
        shown: Whether to show the bar; ``None`` does once it takes longer than two seconds. Only
            the main process shows one, and none where the environment variable
            ``LAPLACE_LORA_PROGRESS`` is 0.
        title: Title of the bar.
        loader: What the items are of, if they have no length themselves.
    """
    wanted = shown is not False and is_main() and os.environ.get(VARIABLE, "1") not in OFF
    by_default: dict[str, Any] = {"delay": DELAY, "leave": None} if shown is None else {}
    total = None
    with suppress(TypeError, AttributeError, NotImplementedError):  # a stream has no length
        total = len(items if loader is None else loader)  # type: ignore[arg-type]
    bar: Iterable[T] = tqdm(items, disable=not wanted, desc=title, total=total, **by_default)
    return bar


def until(batches: Iterable[Batch], at_most: float) -> Iterator[Batch]:
    """Yield batches until there have been so many examples."""
    seen = 0
    for batch in batches:
        yield batch
        if at_most < math.inf:
            seen += batch_length(batch)
        if seen >= at_most:
            return
