"""`acquire`: ranks a pool for labelling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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

from laplace_lora.acquisition.bait import bait
from laplace_lora.acquisition.batch_bald import batch_bald
from laplace_lora.acquisition.joint_samples import joint_samples
from laplace_lora.data.streams import is_stream
from laplace_lora.display.tables import plain
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.predictive.data_sets import predict
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.linear_samples import seeded
from laplace_lora.structures.state import Posterior

SINGLE = {"entropy": "entropy", "bald": "mutual_information"}
METHODS = (*SINGLE, "batchbald", "bait")
SAMPLES = 128
IN_ORDER = (SequentialSampler, BatchSampler)  # the latter by the sampler inside
LOOKS = 3  # a few random places come in order by chance
SHUFFLED = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


@dataclass(frozen=True)
class Acquisition:
    """Examples to label next.

    Attributes:
        indices: Their places in the pool, ``(n,)``, the most wanted first.
        scores: What each is worth, see `acquire`.
        method: How they were chosen.
    """

    indices: Tensor
    scores: Tensor
    method: str

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.indices)

    def to_dict(self) -> dict[str, Any]:
        """Return indices and scores as lists, and the method."""
        return {
            "indices": plain(self.indices),
            "scores": plain(self.scores),
            "method": self.method,
        }


def acquire(
    posterior: Posterior,
    pool: Any,
    n: int,
    method: str,
    tokenizer: Any,
    batch_size: int,
    n_samples: int | None,
    generator: torch.Generator | None,
    progress_bar: bool | None,
) -> Acquisition:
    """Return the examples of a pool that are worth labelling, see `LoraLaplace.acquire`."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    if posterior.objective.name != "classification":
        raise ValueError(
            "acquire() chooses by what labels tell about the weights of a classifier; it does not "
            f"support likelihood={posterior.objective.name!r}"
        )
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if n_samples is not None and n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")
    _check_order(pool)
    data = (pool, tokenizer, batch_size)
    if method in SINGLE:
        found = predict(Predictor(posterior), *data, QUADRATURE, n_samples, generator, progress_bar)
        worth = getattr(found, SINGLE[method])
        _check_size(n, len(worth))
        scores, indices = worth.sort(descending=True, stable=True)
        return Acquisition(indices[:n].cpu(), scores[:n].cpu(), method)
    count = SAMPLES if n_samples is None else n_samples
    samples = joint_samples(posterior, *data, count, generator, progress_bar)
    _check_size(n, len(samples.mean))
    if method == "bait":
        return Acquisition(*bait(samples, n), method)
    source = seeded(posterior, generator)
    return Acquisition(*batch_bald(samples.log_probabilities(), n, source), method)


def _check_order(pool: Any) -> None:
    """Refuse a loader that reorders its data: places in its order name no examples."""
    if is_stream(pool):
        return  # its sampler tells nothing, and has no end
    for sampler in _samplers(pool):
        if _reorders(sampler):
            raise ValueError(
                f"the pool's loader draws its examples in random order, or in one of its own "
                f"({type(sampler).__name__}), so their places would name others; make it, or its "
                "DistributedSampler, with shuffle=False, and without a sampler that sorts"
            )


def _samplers(pool: Any) -> Iterator[Any]:
    """Yield what may order a loader's examples; accelerate puts batch samplers into others."""
    yield getattr(pool, "sampler", None)
    batches = getattr(pool, "batch_sampler", None)
    while batches is not None:
        yield batches
        yield getattr(batches, "sampler", None)
        batches = getattr(batches, "batch_sampler", None)


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
            drawn = [p for item in sampler for p in (item if isinstance(item, list) else [item])]
            if drawn != sorted(drawn):
                return False
    return True


def _check_size(n: int, examples: int) -> None:
    if n > examples:
        raise ValueError(f"n={n} examples were asked for, and the pool has {examples}")
