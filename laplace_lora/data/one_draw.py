"""Loaders that draw other examples in each pass, read as one of their draws.

A fit sums over one draw. What is tuned or measured afterwards on another would mix two data sets.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from laplace_lora.data.chained import Chained
from laplace_lora.data.dealing import loader_like
from laplace_lora.data.order import places_in, samplers_of
from laplace_lora.data.shares import share_of
from laplace_lora.data.streams import is_stream

SHARD = "DataLoaderShard"  # accelerate's, whose pass is a plain one in a single process
ORDERED = (SequentialSampler, DistributedSampler)
SAME = (list, tuple, range, *ORDERED, SubsetRandomSampler)  # all of the same examples

_DRAWN: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # from loaders to their latest draws
_OTHERS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # whether samplers give others


def one_draw(loader: Any) -> Any:
    """Return a loader of the examples that a pass would draw now, the same in all of its passes.

    Returns:
        The loader itself, if all its passes have the same examples, in any order; or if it cannot
        be kept to one draw, as processes share it or it is iterated over in a way of its own.
    """
    if not draws_anew(loader) or not _is_plain(loader) or share_of(loader) is not None:
        return loader
    # As every pass begins, so that the draw is the one that the loader would have given.
    torch.empty((), dtype=torch.int64).random_(generator=loader.generator)
    if loader.batch_sampler is None:  # each item is a batch
        return loader_like(loader, loader.dataset, batch_size=None, sampler=list(loader.sampler))
    return loader_like(loader, loader.dataset, batch_sampler=list(loader.batch_sampler))


def remember(loader: Any, drawn: Any) -> None:
    """Keep what a fit has seen, for whoever gives the same loader again.

    Args:
        loader: The loader that was given.
        drawn: What `one_draw` has made of it.
    """
    if drawn is not loader:
        _DRAWN[loader] = drawn


def same_draw(loader: Any, purpose: str) -> Any:
    """Return a loader of the examples that the latest fit on a loader has drawn.

    Returns:
        The loader itself, if all its passes have the same examples.

    Raises:
        ValueError: If its draw has not been kept.
    """
    drawn = _DRAWN.get(loader) if isinstance(loader, DataLoader) else None
    if drawn is not None:
        return drawn
    if draws_anew(loader):
        raise ValueError(
            "the loader draws other examples in each pass (a sampler with replacement or of some "
            f"examples, or shuffling with drop_last=True), and {purpose} needs those of the fit, "
            "which were not kept: the fit was in another process, on another loader, on one that "
            "processes share, or on one that iterates in a way of its own. Draw the examples once, "
            "torch.utils.data.Subset(data, places), and give both the same ones"
        )
    return loader


def draws_anew(loader: Any) -> bool:
    """Return whether the passes over a loader have different examples, as far as samplers tell."""
    if isinstance(loader, Chained):
        return any(map(draws_anew, loader.loaders))
    return not is_stream(loader) and any(map(_draws, samplers_of(loader)))


def _is_plain(loader: Any) -> bool:
    """Return whether a loader's batches are what its samplers, data and collator make of them."""
    if type(loader).__name__ == SHARD:
        return not getattr(loader, "skip_batches", 0)
    return type(loader).__iter__ is DataLoader.__iter__


def _draws(sampler: Any) -> bool:
    """Return whether a sampler gives other places in each pass, whatever those inside it do."""
    if sampler is None or isinstance(sampler, SAME) or hasattr(sampler, "batch_sampler"):
        return False
    if isinstance(sampler, WeightedRandomSampler):
        return True
    if isinstance(sampler, RandomSampler):
        whole = max(len(sampler.data_source), 1)
        return sampler.replacement or sampler.num_samples % whole != 0
    if type(sampler) is not BatchSampler:
        return _gives_other_places(sampler)
    inner: Any = sampler.sampler
    drops = sampler.drop_last and len(inner) % sampler.batch_size != 0
    return drops and not isinstance(inner, (list, tuple, range, *ORDERED))


def _gives_other_places(sampler: Any) -> bool:
    """Return whether a sampler of unknown kind gives other places when it is asked again.

    Asking goes through all of its places, so that each sampler is asked once; which of both it does
    is taken not to change.
    """
    try:
        known = _OTHERS.get(sampler)
    except TypeError:  # it has no hash, or there are no weak references to it
        return _asked_twice(sampler)
    if known is None:
        _OTHERS[sampler] = known = _asked_twice(sampler)
    return known


def _asked_twice(sampler: Iterable[Any]) -> bool:
    with torch.random.fork_rng(devices=[]):
        if iter(sampler) is sampler:
            return False  # can be iterated over once only
        first, second = Counter(places_in(sampler)), Counter(places_in(sampler))
    return first != second
