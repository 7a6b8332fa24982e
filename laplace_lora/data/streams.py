"""Streams that several processes read: whether each has all of the data, or its part.

Most streams do not say. Their first examples do: those of all processes are compared once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.data import IterableDataset

from laplace_lora.data.batches import Batch
from laplace_lora.data.tally import FEW, fingerprints

_DEALT: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_BEGUN: WeakKeyDictionary[Any, Iterator[Any]] = WeakKeyDictionary()


def is_stream(loader: object) -> bool:
    """Return whether a loader's data set is only iterated over."""
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def is_dealt(stream: object) -> bool | None:
    """Return whether processes read different examples of a stream, ``None`` if not yet known."""
    return _DEALT.get(stream)


def begin(stream: Any) -> list[int]:
    """Return the fingerprints of a stream's first examples, which the next pass begins with."""
    batches, found = iter(stream), []
    read: list[Batch] = []
    for batch in batches:
        read.append(batch)
        found += fingerprints(batch)
        if len(found) >= FEW:
            break
    _BEGUN[stream] = chain(read, batches)
    return found


def begun(loader: Any) -> Iterable[Any]:
    """Return what a pass over a loader iterates over: what has begun, which is then forgotten."""
    batches: Iterable[Any] = _BEGUN.pop(loader, loader) if is_stream(loader) else loader
    return batches


def forget(loader: Any) -> None:
    """Close what has begun, if no pass has taken it."""
    if is_stream(loader):
        _BEGUN.pop(loader, None)


def decide(stream: Any, heads: Sequence[list[int]]) -> None:
    """Find out whether processes read different examples of a stream.

    Args:
        stream: The loader.
        heads: From `begin`, of every process.

    Raises:
        TypeError: If some processes read the same examples and others do not.
    """
    known = [tuple(head) for head in heads if head]
    if len(set(known)) not in (1, len(known)) or (len(set(known)) == 1 < len(known) < len(heads)):
        raise TypeError(
            "some processes read the same examples of the stream, others different ones; give each "
            "its own part, or all the same examples in the same order"
        )
    _DEALT[stream] = len(heads) > len(known) or len(set(known)) > 1 if known else False
