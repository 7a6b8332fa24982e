"""How likely the labels of texts are, under samples of the linearised model of several widths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.generation.next_token import language_model_of
from laplace_lora.generation.reading import Reading
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.links import check_finite
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.inputs.image_rows import divides
from laplace_lora.models.tangents.forward_mode import forward_mode
from laplace_lora.predictive.sample_set import SampleSet
from laplace_lora.structures.posterior import Posterior

Places = tuple[Tensor, Tensor]
MODERATE = 40.0  # a logarithm up to which a sum of exponentials loses nothing
POSITIONS = "position_ids"
# Of joined texts, by collators of TRL and transformers; attention derives them from positions.
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def label_log_probabilities(
    posterior: Posterior, samples: SampleSet, batch: Mapping[str, Any], scales: Tensor
) -> tuple[Tensor, Tensor]:
    """Return log probabilities of a batch's labels under posteriors of several widths, in one pass.

    Args:
        posterior: A fitted posterior over a causal language model's adapters.
        samples: Of its weights.
        batch: Texts with the labels that count, as `Likelihood.split` gives them.
        scales: Factors of the covariance of the weights, ``(scales,)``.

    Returns:
        Under the MAP, ``(texts, tokens)``, and under each predictive, ``(scales, texts, tokens)``;
        zero where nothing is scored.

    Raises:
        ValueError: If the model cannot carry tangents, see `forward_mode`.
    """
    model, labels = language_model_of(posterior, 1), batch["labels"]
    temperature = posterior.settings.likelihood_temperature
    place: dict[str, Any] = {"dtype": posterior.dtype, "device": labels.device}
    by_map = torch.zeros(labels.shape, **place)
    predictive = torch.zeros(len(scales), *labels.shape, **place)
    with (
        evaluation_mode(model),
        forward_mode(model.model, posterior.engine.parameters, samples.directions) as forward,
    ):
        for places, logits, tangents in at_labels(Reading(model, forward, batch), labels):
            f, slopes = logits.to(posterior.dtype), tangents.to(posterior.dtype)
            del logits, tangents  # before the next ones are there
            token = labels[places].unsqueeze(1)
            by_map[places] = (f / temperature).log_softmax(1).gather(1, token).squeeze(1)
            f, slopes = samples.centred(f, slopes)
            log_p = (f / temperature).log_softmax(1)
            for row, width in zip(predictive, scales.sqrt().tolist(), strict=True):
                row[places] = _predictive(samples, log_p, slopes, width / temperature, token)
            del f, slopes, log_p
    return by_map, predictive


def at_labels(
    reading: Reading, labels: Tensor, rows: Tensor | None = None
) -> Iterator[tuple[Places, Tensor, Tensor]]:
    """Read texts, and yield what predicts their labels.

    Args:
        reading: Of texts of which nothing is read yet.
        labels: ``(texts, tokens)``, `IGNORED` where nothing is scored.
        rows: The texts' rows in the user's batch; their own by default.

    Yields:
        Text and place of some labels, ``(k,)`` each, the logits that predict them, ``(k,
        vocabulary)``, and their tangents, ``(directions, k, vocabulary)``.

    Raises:
        FloatingPointError: If logits are not finite; names the rows.
    """
    scored = labels != IGNORED
    columns = scored.any(0).nonzero().squeeze(1) - 1
    for read, logits, tangents in reading.logits(columns):
        wanted = scored[:, read + 1]
        texts, at = wanted.nonzero(as_tuple=True)
        # Over a vocabulary they are large: they are copied, and outlive a step, only if they must.
        logits, tangents = logits.flatten(0, 1), tangents.flatten(1, 2)
        if not bool(wanted.all()):
            logits, tangents = logits[wanted.flatten()], tangents[:, wanted.flatten()]
        check_finite(logits, texts if rows is None else rows[texts])
        yield (texts, read[at] + 1), logits, tangents
        del logits, tangents


def part_of(batch: Mapping[str, Any], rows: Tensor, end: int, config: Any) -> dict[str, Any]:
    """Return some texts of a batch, up to a place; whole where not all inputs can be cut.

    Args:
        batch: Texts.
        rows: Which of them.
        end: The place.
        config: The model's configuration, which tells images among the tokens.

    Raises:
        ValueError: If other inputs do not have a row for each text, and not all texts are wanted.
    """
    texts, width = batch["input_ids"].shape
    part = {k: v for k, v in batch.items() if k not in BOUNDS or end == width}
    positions = part.get(POSITIONS)
    if isinstance(positions, Tensor) and positions.shape == (1, width):  # the same for all
        part[POSITIONS] = positions.expand(texts, -1)
    if not divides(part, config, texts):
        if rows.tolist() == list(range(texts)):
            return part
        shapes = {k: tuple(v.shape) for k, v in part.items() if isinstance(v, Tensor)}
        raise ValueError(
            "some of the texts cannot be read without the others, as not all inputs have a row for "
            f"each text (images in one tensor, for instance): {shapes}; give one text at a time, "
            "or all to method='sampled' without batch_size"
        )
    for key, value in part.items():
        if isinstance(value, Tensor) and value.ndim:
            chosen = value[rows]
            part[key] = chosen[:, :end] if chosen.shape[1:2] == (width,) else chosen
    return part


def _predictive(
    samples: SampleSet, log_p: Tensor, slopes: Tensor, width: float, token: Tensor
) -> Tensor:
    """Return the log of tokens' probabilities, averaged over samples, ``(k,)``.

    Args:
        samples: What the directions stand for.
        log_p: Log probabilities at the posterior's mean, ``(k, vocabulary)``.
        slopes: Change of the logits along each direction, ``(directions, k, vocabulary)``.
        width: Of the samples.
        token: One in each place, ``(k, 1)``.
    """
    own, totals = [], []
    for f in samples.each_output(log_p, slopes, width):
        own.append(f.gather(1, token))
        # Not `logsumexp`, most of whose time the maximum takes: of no change the sum is one.
        totals.append(f.exp_().sum(1, keepdim=True).log())
    found = torch.stack(totals)
    if not bool((found.abs() < MODERATE).all()):
        each = samples.each_output(log_p, slopes, width)
        found = torch.stack([f.logsumexp(1, keepdim=True) for f in each])
    return (torch.stack(own) - found).logsumexp(0).squeeze(1) - math.log(samples.n_samples)
