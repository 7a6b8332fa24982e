"""Whether a loader gives its examples in the order of its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from laplace_lora.data.streams import is_stream

IN_ORDER = (SequentialSampler, BatchSampler)  # the latter by the sampler inside
LOOKS = 3  # a few random places come in order by chance
SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def check_order(loader: Any, data: str) -> None:
    """Refuse a loader that reorders its data: places in its order name no examples.

    Args:
        loader: Any iterable of batches.
        data: What it holds, for the message.

    Raises:
        ValueError: If it does.
    """
    if is_stream(loader):
        return  # its sampler tells nothing, and has no end
    if getattr(loader, "num_workers", 0) > 1 and not getattr(loader, "in_order", True):
        raise ValueError(
            f"{data}'s loader gives batches as its workers finish them, so their places would name "
            "others; make it with in_order=True"
        )
    for sampler in samplers_of(loader):
        if _reorders(sampler):
            raise ValueError(
                f"{data}'s loader draws its examples in random order, or in one of its own "
                f"({type(sampler).__name__}), so their places would name others; make it, or its "
                "DistributedSampler, with shuffle=False, and without a sampler that sorts"
            )


def samplers_of(loader: Any) -> Iterator[Any]:
    """Yield what may order a loader's examples; accelerate puts batch samplers into others."""
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, BatchSampler):  # in a loader without a batch size
        yield sampler
        sampler = getattr(loader, "batch_sampler", None)
    while sampler is not None:
        yield sampler
        yield getattr(sampler, "sampler", None)
        sampler = getattr(sampler, "batch_sampler", None)


def places_in(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the places that a sampler gives, one by one or in batches."""
    for item in items:
        value = item.tolist() if isinstance(item, Tensor) else item
        yield from value if isinstance(value, list | tuple) else [value]


def _reorders(sampler: Any) -> bool:
    if sampler is None or type(sampler) in IN_ORDER or hasattr(sampler, "batch_sampler"):
        return False
    if isinstance(sampler, DistributedSampler):
        return getattr(sampler, "shuffle", True)  # by length, it has no such attribute
    return isinstance(sampler, SHUFFLED) or not _is_seen_in_order(sampler)


def _is_seen_in_order(sampler: Any) -> bool:
    """Return whether a sampler of unknown kind gives its places in rising order, repeatedly."""
    with torch.random.fork_rng(devices=[]):
        if iter(sampler) is sampler:
            return True  # can be iterated over once only
        for _ in range(LOOKS):
            drawn = list(places_in(sampler))
            if drawn != sorted(drawn):
                return False
    return True
