"""`score`: which tokens of given texts a language model is unsure of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import together
from laplace_lora.data.loaders import progress
from laplace_lora.generation.label_scores import at_labels, part_of
from laplace_lora.generation.next_token import (
    HasPosterior,
    NextToken,
    NextTokenPredictor,
    check_call,
)
from laplace_lora.generation.reading import columns_at_once
from laplace_lora.generation.sampled_predictor import SampledPredictor
from laplace_lora.generation.token_predictions import TokenPredictions
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.inputs.positions import holds_joined_texts
from laplace_lora.models.inputs.rotary import check_same_angles
from laplace_lora.models.token_model import TOP_K
from laplace_lora.predictive.linear_samples import EXACT, SAMPLED

SAMPLES = 32
TITLE = "Scoring"

Scored = tuple[list[NextToken], list[tuple[Tensor, Tensor]]]


@in_full_precision
def score(
    la: HasPosterior,
    batch: Mapping[str, Any],
    top_k: int = TOP_K,
    link_approx: str | None = None,
    n_samples: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    method: str = SAMPLED,
    progress_bar: bool | None = None,
) -> TokenPredictions:
    """Predict every scored token of given texts from the tokens before it.

    It takes any posterior over a causal language model's adapters, fitted on next tokens
    (``"language_modeling"``) or on answers (``target_ids``).

    Args:
        la: A fitted posterior.
        batch: Texts as for a fit with ``"language_modeling"``: ``input_ids``, ``labels`` (not
            shifted, -100 where nothing is scored) and, if padded on either side,
            ``attention_mask``.
        top_k: Tokens looked at in each place. Entropies are over the whole vocabulary.
        link_approx: Of the exact method. ``"quadrature"``, its default, integrates over the tokens'
            contrasts, without random numbers; ``"mc"`` averages over samples of the logits.
            ``"probit"`` needs no integral, but counts what all logits share as uncertainty; its
            mutual information is ``½ tr(Λ Σ)``, right for small covariances and at most the
            entropy.
        n_samples: Samples of the weights, 32 by default; of the logits (1000) for ``"mc"``. The
            same in all places.
        generator: Their source, on the posterior's device.
        batch_size: Texts read together, for ``"exact"`` places predicted together; all texts, or as
            many places as texts, by default.
        method: ``"sampled"`` carries samples of the linearised model through one pass over the
            texts: linear in their length, joint over tokens, see `SampledPredictor`. ``"exact"``
            computes exact moments of the ``top_k`` logits, with a forward pass and ``top_k + 1``
            backward passes over all of the text before each token.
        progress_bar: Whether to show progress, see `progress`.

    Returns:
        Predictions of the scored tokens, in the order of the text.

    Raises:
        AttributeError: If the posterior has not been fitted.
        TypeError: If there is no posterior, the batch is no mapping with tensors ``input_ids`` and
            ``labels``, ``top_k`` is no number, or the generator is none.
        ValueError: If nothing is scored, labels do not fit the tokens or the vocabulary, an option
            is out of range, the model is no causal language model, or it cannot carry tangents
            (8-bit weights, compiled or offloaded models), which the exact method does not need; or
            the exact method meets a posterior whose mean was moved.
        FloatingPointError: If logits are not finite; names the rows.
    """
    check_call(la, method, link_approx)
    _check_batch(batch, top_k)
    predictor: NextTokenPredictor | SampledPredictor
    if method == EXACT:
        with together(runs=la.fitted.source):
            predictor = NextTokenPredictor(la, top_k, link_approx, n_samples, generator)
    else:
        predictor = SampledPredictor(
            la, top_k, SAMPLES if n_samples is None else n_samples, generator
        )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    batch = {k: v.to(la.fitted.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = token_labels(batch, batch["labels"])
    scored = labels != IGNORED
    if not bool(scored.any()):
        raise ValueError("no token of the batch is scored: all labels are -100 or on padding")
    vocabulary: Any = predictor.model.vocabulary_size
    if int(labels[scored].min()) < 0 or int(labels.max()) >= vocabulary:
        raise ValueError(f"labels must lie in the vocabulary, 0..{vocabulary - 1}, or be -100")
    size = batch_size or len(labels)
    variance = None
    if isinstance(predictor, NextTokenPredictor):
        first = int(scored.any(0).to(torch.uint8).argmax())
        check_same_angles(predictor.model.config, first, scored.shape[1])
        predictions, where = _exact(predictor, batch, labels, size, progress_bar)
        variance = predictor.variance({**batch, "labels": labels})
    else:
        predictions, where = _sampled(predictor, batch, labels, size, top_k, progress_bar)
    slots = scored.cumsum(1) - 1
    return TokenPredictions.laid_out(
        predictions,
        [labels[rows, places] for rows, places in where],
        [(rows, slots[rows, places]) for rows, places in where],
        len(labels),
        predictor.model.pad_token,
        variance,
    )


def scoring_bytes(labels: Tensor, logits: Tensor) -> int:
    """Return about how many bytes `score` takes over the vocabulary, at its defaults.

    Args:
        labels: The labels that count, ``(texts, tokens)``.
        logits: Of any tokens, ``(k, vocabulary)``; tell size and dtype.
    """
    directions, (texts, _), vocabulary = SAMPLES // 2, labels.shape, logits.shape[-1]
    wanted = int((labels != IGNORED).any(0).sum())
    columns = min(wanted, columns_at_once(directions, texts, vocabulary))
    # Beside the tangents: logits, a sample, its exponentials, and four of the predictive.
    return (directions + 6) * columns * texts * vocabulary * logits.element_size()


def _check_batch(batch: Any, top_k: Any) -> None:
    names = ("input_ids", "labels")
    if not isinstance(batch, Mapping) or not all(isinstance(batch.get(n), Tensor) for n in names):
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(
            f"score needs a mapping with tensors 'input_ids' and 'labels', got {got}; tokenize "
            "texts with padding=True, return_tensors='pt', and set labels to -100 where nothing is "
            "scored"
        )
    if not hasattr(top_k, "__index__"):
        raise TypeError(
            f"`top_k` must be an int, got {type(top_k).__name__}; score takes no tokenizer"
        )


def _exact(
    predictor: NextTokenPredictor,
    batch: Mapping[str, Any],
    labels: Tensor,
    size: int,
    progress_bar: bool | None,
) -> Scored:
    rows, places = (labels != IGNORED).nonzero(as_tuple=True)
    order = places.argsort(stable=True)  # texts of similar length share a pass
    parts = order.split(size)
    are_joined = holds_joined_texts(batch)
    if are_joined:  # those of unequal length would need a mask
        counts = places[order].unique_consecutive(return_counts=True)[1].tolist()
        parts = tuple(part for equal in order.split(counts) for part in equal.split(size))
    where = [(rows[part], places[part]) for part in parts]
    shown = progress(where, progress_bar, TITLE)
    read = _part if are_joined else _until
    config = predictor.model.config
    predictions = [predictor(read(batch, n, at, config), labels[n, at], n) for n, at in shown]
    return predictions, where


def _sampled(
    predictor: SampledPredictor,
    batch: Mapping[str, Any],
    labels: Tensor,
    size: int,
    top_k: int,
    progress_bar: bool | None,
) -> Scored:
    predictions, where = [], []
    parts = torch.arange(len(labels), device=labels.device).split(size)
    for texts in progress(parts, progress_bar, TITLE):
        wanted = labels[texts]
        scored = (wanted != IGNORED).any(0).nonzero()
        if not len(scored):
            continue
        part = part_of(batch, texts, int(scored.max()), predictor.model.config)
        with predictor.opened(part) as reading:
            for (rows, places), logits, tangents in at_labels(reading, wanted, texts):
                token = predictor.token(logits, tangents)
                predictions.append(token.of(wanted[rows, places], top_k))
                where.append((texts[rows], places))
                del logits, tangents, token  # before the next ones are there
    return predictions, where


def _part(batch: Mapping[str, Any], rows: Tensor, places: Tensor, config: Any) -> dict[str, Any]:
    """Return texts up to the last of their places, which is left out."""
    return part_of(batch, rows, int(places.max()), config)


def _until(batch: Mapping[str, Any], rows: Tensor, places: Tensor, config: Any) -> dict[str, Any]:
    """Return texts up to a place in each of them, which is left out."""
    cut = _part(batch, rows, places, config)
    mask = cut.get("attention_mask")
    mask = torch.ones_like(cut["input_ids"]) if mask is None else mask
    before = torch.arange(mask.shape[1], device=places.device) < places.unsqueeze(1)
    return {**cut, "attention_mask": mask * before}
