"""Which tokens a language model is unsure of: in a text that is given, or one that it writes.

`score` and `generate` walk over the positions of texts and lay the results out. They take any
posterior over a causal language model's adapters, fitted on next tokens (``"language_modeling"``)
or on answers (``target_ids``).

Gradients run through the whole text before a token, so every token costs a forward pass over it and
``top_k + 1`` backward passes, shared by a batch; there is no cache of keys and values to spare it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.generation.next_token import HasPosterior, NextTokenPredictor
from laplace_lora.generation.token_predictions import TokenPredictions
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.models.token_model import TOP_K

SAMPLES = 1000


def score(
    la: HasPosterior,
    batch: Mapping[str, Any],
    top_k: int = TOP_K,
    link_approx: str = QUADRATURE,
    n_samples: int = SAMPLES,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
) -> TokenPredictions:
    """Predict every scored token of given texts from the tokens before it.

    Args:
        la: A fitted posterior over a causal language model's adapters.
        batch: Texts as for a fit with ``"language_modeling"``: ``input_ids``, ``labels`` (not
            shifted, -100 where nothing is scored) and, if padded on either side,
            ``attention_mask``.
        top_k: Tokens looked at in each place.
        link_approx: ``"quadrature"`` integrates over the tokens' contrasts, without random
            numbers; ``"mc"`` averages over samples of the logits. ``"probit"`` needs no integral,
            but counts what all logits share as uncertainty; its mutual information is
            ``½ tr(Λ Σ)``, right for small covariances and at most the entropy.
        n_samples: Samples for ``"mc"``, the same in all places.
        generator: Their source, on the posterior's device.
        batch_size: Places predicted together, as many as there are texts by default.

    Returns:
        Predictions of the scored tokens, in the order of the text.

    Raises:
        AttributeError: If the posterior has not been fitted.
        TypeError: If the batch is no mapping with ``input_ids`` and ``labels``.
        ValueError: If nothing is scored, labels do not fit the tokens or the vocabulary, an option
            is out of range, or the model is no causal language model.
    """
    predictor = NextTokenPredictor(la, top_k, link_approx, n_samples, generator)
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch):
        raise TypeError("score needs a mapping with 'input_ids' and 'labels'")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    batch = {k: v.to(la.fitted.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    labels = token_labels(batch, batch["labels"])
    scored = labels != IGNORED
    rows, places = scored.nonzero(as_tuple=True)
    if not len(rows):
        raise ValueError("no token of the batch is scored: all labels are -100 or on padding")
    vocabulary: Any = predictor.model.vocabulary_size
    if int(labels[scored].min()) < 0 or int(labels.max()) >= vocabulary:
        raise ValueError(f"labels must lie in the vocabulary, 0..{vocabulary - 1}, or be -100")
    order = places.argsort(stable=True)  # texts of similar length share a pass
    predictions = [
        (part, predictor(_until(batch, rows[part], places[part]), labels[rows[part], places[part]]))
        for part in order.split(batch_size or len(labels))
    ]
    slots = (scored.cumsum(1) - 1)[scored]
    where = [(rows[part], slots[part]) for part, _ in predictions]
    tokens = [labels[rows[part], places[part]] for part, _ in predictions]
    pad = predictor.model.pad_token
    variance = predictor.variance({**batch, "labels": labels})
    return TokenPredictions.laid_out(
        [prediction for _, prediction in predictions], tokens, where, len(labels), pad, variance
    )


def generate(
    la: HasPosterior,
    inputs: Mapping[str, Any] | Tensor,
    max_new_tokens: int = 20,
    top_k: int = TOP_K,
    do_sample: bool = False,
    link_approx: str = QUADRATURE,
    n_samples: int = SAMPLES,
    generator: torch.Generator | None = None,
    eos_token_id: int | list[int] | None = None,
) -> TokenPredictions:
    """Continue texts, token by token from the posterior predictive.

    Args:
        la: A fitted posterior over a causal language model's adapters.
        inputs: Prompts: a mapping with ``input_ids`` and, if padded on either side,
            ``attention_mask``; or the token numbers alone, ``(texts, tokens)``.
        max_new_tokens: Where to stop at the latest.
        top_k: Tokens looked at in each place; no other is generated.
        do_sample: Draw tokens from the predictive among the ``top_k``, instead of taking the
            likeliest.
        link_approx: As of `score`.
        n_samples: As of `score`.
        generator: Source of the samples and the draws, on the posterior's device.
        eos_token_id: Tokens that end a text; by default those of the model's configuration.

    Returns:
        Predictions of the new tokens, an ending one among them.

    Raises:
        AttributeError: If the posterior has not been fitted.
        ValueError: If a prompt is missing, an option is out of range, or the model is no causal
            language model.
    """
    predictor = NextTokenPredictor(la, top_k, link_approx, n_samples, generator)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
    ids, mask = _left_padded(inputs, la.fitted.device)
    prompt = ids.shape[1]
    ends = predictor.model.end_tokens if eos_token_id is None else eos_token_id
    stop = torch.tensor(ends, device=ids.device, dtype=torch.long).reshape(-1)
    live = torch.arange(len(ids), device=ids.device)
    pad = predictor.model.pad_token
    predictions, tokens, where = [], [], []
    while len(live) and ids.shape[1] < prompt + max_new_tokens:
        prediction = predictor({"input_ids": ids[live], "attention_mask": mask[live]})
        chosen = prediction.log_probabilities.argmax(-1, keepdim=True)
        if do_sample:
            weights = prediction.log_probabilities.softmax(-1)
            chosen = torch.multinomial(weights, 1, generator=generator)
        token = prediction.candidates.gather(-1, chosen).squeeze(-1)
        predictions.append(prediction)
        tokens.append(token)
        where.append((live, torch.full_like(live, ids.shape[1] - prompt)))
        ids, mask = (torch.cat([x, torch.zeros_like(x[:, :1])], dim=1) for x in (ids, mask))
        ids[live, -1], mask[live, -1] = token, 1
        live = live[~torch.isin(token, stop)]
    labels = ids.masked_fill(mask == 0, IGNORED)
    labels[:, :prompt] = IGNORED
    variance = predictor.variance({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return TokenPredictions.laid_out(predictions, tokens, where, len(ids), pad, variance)


def _until(batch: Mapping[str, Any], rows: Tensor, places: Tensor) -> dict[str, Any]:
    """Return texts up to a place in each of them, which is left out."""
    texts, width = batch["input_ids"].shape
    end = int(places.max())
    cut = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:1] == (texts,):
            value = value[rows]
            value = value[:, :end] if value.shape[1:2] == (width,) else value
        cut[key] = value
    mask = cut.get("attention_mask")
    mask = torch.ones_like(cut["input_ids"]) if mask is None else mask
    before = torch.arange(end, device=places.device) < places.unsqueeze(1)
    return {**cut, "attention_mask": mask * before}


def _left_padded(inputs: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token numbers and mask with the padding, wherever it was, on the left.

    Raises:
        ValueError: If there are no prompts, or one is empty.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            "prompts are missing: generate needs 'input_ids' of shape (texts, tokens), from a "
            "tokenizer with return_tensors='pt'"
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    mask = torch.ones_like(ids) if mask is None else (mask != 0).to(ids)
    if not bool(mask.any(1).all()):
        raise ValueError("a prompt has no real token; begin it with the tokenizer's bos token")
    order = mask.argsort(dim=1, stable=True)
    ids, mask = (x.gather(1, order).to(device) for x in (ids, mask))
    return ids.masked_fill(mask == 0, 0), mask
