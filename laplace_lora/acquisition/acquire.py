"""`acquire`: ranks a pool for labelling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.acquisition.bait import bait
from laplace_lora.acquisition.batch_bald import batch_bald
from laplace_lora.acquisition.joint_samples import JointSamples, joint_samples
from laplace_lora.data.order import check_order
from laplace_lora.display.tables import plain
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.predictive.data_sets import ExamplePredictor, predict
from laplace_lora.predictive.linear_samples import seeded
from laplace_lora.structures.posterior import Posterior

SINGLE = {"entropy": "entropy", "bald": "mutual_information"}
METHODS = (*SINGLE, "batchbald", "bait")
SAMPLES = 128  # of the weights
DRAWS = 2048  # of a pool's outputs, for their joint information
ROOM = 2**25  # numbers: draws of a pool with more examples and classes are fewer
MARGIN = 1.5  # nats below what the draws can hold; beyond, picks come ever closer to random ones


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
            f"support likelihood={posterior.objective.name!r}. predict(), of a language model "
            "generation.score, says how uncertain each example is: sort the pool by that"
        )
    if n != int(n) or n < 1:
        raise ValueError(f"n must be a whole number, at least 1; got {n}")
    n = int(n)
    if n_samples is not None and n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")
    check_order(pool, "the pool")
    data = (pool, tokenizer, batch_size)
    if method in SINGLE:
        predictor = ExamplePredictor(posterior, QUADRATURE, n_samples, generator)
        found = predict(predictor, *data, progress_bar)
        worth = getattr(found, SINGLE[method])
        _check_size(n, len(worth))
        scores, indices = worth.sort(descending=True, stable=True)
        return Acquisition(indices[:n].cpu(), scores[:n].cpu(), method)
    count = SAMPLES if n_samples is None else n_samples
    source = seeded(posterior, generator)
    samples = joint_samples(posterior, *data, count, source, progress_bar)
    _check_size(n, len(samples.mean))
    if method == "bait":
        return Acquisition(*bait(samples, n), method)
    return Acquisition(*_most_informative(samples, n, source), method)


def _most_informative(
    samples: JointSamples, n: int, source: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose by joint information, and warn where there is more of it than samples can hold."""
    examples, contrasts = samples.mean.shape
    samples = samples.more(min(DRAWS, ROOM // (examples * (contrasts + 1))), source)
    chosen, gains = batch_bald(samples.log_probabilities(), n, source)
    draws = len(samples.deviations)
    sums = gains.cumsum(0)
    told = 1 + int((sums < math.log(draws) - MARGIN).sum())
    if told < n:
        warn(
            f"the first {told} of {n} examples hold {sums[told - 1]:.1f} nats, about all that "
            f"{draws} samples can tell, ln({draws}) = {math.log(draws):.1f}; the others are "
            "chosen more and more at random, and their scores are too small. Label the first "
            "ones and fit again before you choose more, or use method='bait'"
        )
    return chosen, gains


def _check_size(n: int, examples: int) -> None:
    if n > examples:
        raise ValueError(f"n={n} examples were asked for, and the pool has {examples}")
