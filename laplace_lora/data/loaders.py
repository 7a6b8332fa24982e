"""Iterate over loaders with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

from tqdm.auto import tqdm

from laplace_lora.data.shares import is_main, is_sharded

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


@dataclass(frozen=True)
class Chained:
    """Loaders one after the other, as often as they can be iterated over.

    Attributes:
        loaders: The loaders.
    """

    loaders: tuple[Iterable[Any], ...]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of all."""
        return chain.from_iterable(self.loaders)


def chained(loaders: Sequence[Iterable[Any] | None]) -> Any:
    """Return one loader of all the data of several.

    Args:
        loaders: At least one; ``None`` where data are not at hand.

    Returns:
        The loader; ``None`` if some data are not at hand, or several loaders are shared by several
        processes, whose parts cannot be told apart any more.
    """
    known = [loader for loader in loaders if loader is not None]
    if len(known) < len(loaders):
        return None
    if len(known) == 1:
        return known[0]
    return None if any(map(is_sharded, known)) else Chained(tuple(known))
