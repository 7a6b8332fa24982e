"""A bounded, random part of some training texts, and how a posterior predicts their tokens."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import some_examples
from laplace_lora.data.distributed import Together
from laplace_lora.data.masks import text_shape
from laplace_lora.generation.label_scores import label_log_probabilities, part_of
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.models.inputs.image_rows import divides
from laplace_lora.predictive.class_scores import class_log_probabilities
from laplace_lora.predictive.linear_samples import LinearSamples
from laplace_lora.predictive.sample_set import SampleSet
from laplace_lora.structures.posterior import Posterior

TEXTS = 64  # at most, and
TOKENS = 2048  # read, of at least one text
SAMPLES = 16  # of the weights, in antithetic pairs
SEED = 0  # of texts and samples


def some_texts(posterior: Posterior, batches: Iterable[Any]) -> list[Mapping[str, Any]]:
    """Return some of the texts, batch by batch, each with the labels that count.

    Which ones is drawn with a fixed seed; the same texts in the same order give the same part.

    Args:
        posterior: A language model's posterior, or a token classifier's.
        batches: Of its training texts.
    """
    generator = torch.Generator().manual_seed(SEED)
    lowest: list[tuple[float, int, int, int]] = []  # of the numbers drawn, as a heap
    kept: dict[int, Mapping[str, Any]] = {}
    for index, batch in enumerate(batches):
        x, y = posterior.split(batch)
        drawn = torch.rand(len(y), generator=generator).tolist()
        lengths = _lengths(x, y)
        for row in (y != IGNORED).any(1).nonzero().flatten().tolist():
            item = (-drawn[row], index, row, lengths[row])
            (heapq.heappush if len(lowest) < TEXTS else heapq.heappushpop)(lowest, item)
        kept[index] = x
        wanted = {item[1] for item in lowest}
        kept = {number: x for number, x in kept.items() if number in wanted}
    rows: dict[int, list[int]] = {}
    read = 0
    for _, index, row, length in sorted(lowest, reverse=True):
        if read and read + length > TOKENS:
            break
        read += length
        rows.setdefault(index, []).append(row)
    return [_cut(kept[index], sorted(own), posterior) for index, own in sorted(rows.items())]


def _lengths(x: Mapping[str, Any], y: Tensor) -> list[int]:
    """Return how many tokens of each text are read, as far as its mask says so."""
    mask = x.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == y.ndim:
        return [int(length) for length in mask.sum(1)]
    # Of answers there are two labels, whatever the text's length.
    shape = text_shape(x, "attention_mask") or y.shape
    return [shape[1]] * len(y)


def _cut(batch: Mapping[str, Any], rows: list[int], posterior: Posterior) -> Mapping[str, Any]:
    """Return some texts of a batch on a device, without what follows the last label in vain."""
    device = posterior.device
    labels: Tensor = batch["labels"]
    index = torch.tensor(rows, device=labels.device)
    last = int((labels[index] != IGNORED).any(0).nonzero().max())
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    # The others' images may be in the same tensor.
    if not divides(moved, posterior.source.config, len(labels)):
        others = torch.ones(len(labels), 1, dtype=torch.bool, device=labels.device)
        others[index] = False
        return {**moved, "labels": labels.masked_fill(others, IGNORED).to(device)}
    if not posterior.objective.predicts_tokens:  # an encoder sees what follows as well
        chosen: Any = some_examples(moved, rows)
        return chosen
    return part_of(moved, index.to(device), last + 1, posterior.source.config)


@dataclass(frozen=True)
class TextLosses:
    """How texts are predicted, in nats per scored token.

    Attributes:
        tokens: How many are scored.
        nll_map: Mean NLL under the MAP.
        nll: And under the predictive with each width, ``(scales,)``, float64.
    """

    tokens: int
    nll_map: float
    nll: Tensor


def text_losses(
    posterior: Posterior, texts: Iterable[Mapping[str, Any]], scales: Tensor, team: Together
) -> TextLosses:
    """Read texts once, and return their losses under posteriors of several widths.

    Args:
        posterior: A fitted posterior.
        texts: From `some_texts`.
        scales: Factors of the covariance, ``(scales,)``.
        team: The processes that share the texts, whose losses are added.

    Raises:
        ValueError: If the model cannot carry tangents, see `forward_mode`, or nothing is scored.
    """
    generator = torch.Generator(posterior.device).manual_seed(SEED)
    samples: Any
    scored: Callable[..., tuple[Tensor, Tensor]]
    if posterior.objective.predicts_tokens:
        samples, scored = SampleSet(posterior, SAMPLES, generator), label_log_probabilities
    else:
        samples, scored = LinearSamples(posterior, SAMPLES, generator), class_log_probabilities
    tokens, by_map, predictive = 0, 0.0, torch.zeros(len(scales), dtype=torch.float64)
    for batch in texts:
        own, averaged = scored(posterior, samples, batch, scales)
        tokens += int((batch["labels"] != IGNORED).sum())
        by_map -= float(own.double().sum())
        predictive -= averaged.double().flatten(1).sum(1).cpu()
    count, by_map, *sums = team.total(tokens, by_map, *predictive.tolist())
    if not count:
        raise ValueError("the loader gives no text of which a token is scored")
    return TextLosses(int(count), by_map / count, predictive.new_tensor(sums) / count)
