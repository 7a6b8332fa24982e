"""Predicting every token of whole data sets, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import is_inputs_and_labels
from laplace_lora.data.distributed import Together
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.token_classification import class_labels, real_tokens
from laplace_lora.predictive.data_sets import is_batch, of_batches
from laplace_lora.predictive.inputs import batches_of_rows, in_places, kind_of
from laplace_lora.predictive.texts import encoded
from laplace_lora.predictive.token_class_predictions import TokenClassPredictions
from laplace_lora.predictive.token_classes import TokenClassPredictor


def predict_tokens(
    predictor: TokenClassPredictor,
    data: Any,
    tokenizer: Any,
    batch_size: int,
    progress_bar: bool | None,
) -> TokenClassPredictions:
    """Predict all tokens of a data set, see `LoraLaplace.predict`.

    Args:
        predictor: Of a token classifier's posterior.
        data: Texts, rows or batches.
        tokenizer: The model's.
        batch_size: Texts or rows per batch.
        progress_bar: Whether to show progress, see `progress`.

    Raises:
        TypeError: If the data are none of these.
        ValueError: If they are empty, or see `encoded` and `batches_of_rows`.
    """
    answer = partial(_answer, predictor)
    if is_batch(data):
        return answer(data)
    posterior = predictor.posterior
    kind, items = kind_of(data)
    if isinstance(items, Sequence):
        _check_no_words(items)
    key, order = posterior.label_key, None
    if kind != "batches":
        rows = encoded(items, tokenizer) if kind == "texts" else items
        placed = partial(_with_labels, key)
        order, items = batches_of_rows(rows, tokenizer, batch_size, key, placed)
    place = (TokenClassPredictions, answer, posterior)
    return of_batches(*place, items, progress_bar, order, aligned=_of_one_width)


def _answer(predictor: TokenClassPredictor, batch: Any) -> TokenClassPredictions:
    """Return the predictions of a batch, with its labels where it has any."""
    x, labels = batch, None
    key = predictor.posterior.label_key
    if isinstance(batch, Mapping):
        x, labels = {k: v for k, v in batch.items() if k != key}, batch.get(key)
    elif is_inputs_and_labels(batch):
        x, labels = batch
    predictions = predictor(x)
    if labels is None:
        return predictions
    labels = class_labels(x, torch.as_tensor(labels)).to(predictions.mask.device)
    return replace(predictions, labels=labels)


def _of_one_width(
    parts: list[TokenClassPredictions], team: Together
) -> list[TokenClassPredictions]:
    """Return the predictions of batches, filled up to the longest text of all processes."""
    width = team.longest(part.mask.shape[1] for part in parts)
    return [part.widened(width) for part in parts]


def _check_no_words(items: Sequence[Any]) -> None:
    """Refuse lists of words, of which two would be read as a text and its second one."""
    if any(isinstance(item, list | tuple) and isinstance(item[0], str) for item in items if item):
        raise TypeError(
            "a token classifier is given whole texts, and one of them is a list; join its words, "
            "or give rows, tokenizer(words, is_split_into_words=True)"
        )


def _with_labels(
    key: str, batch: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], before: Tensor
) -> dict[str, Any]:
    """Return a padded batch with the labels of its rows, if all have them."""
    if any(row.get(key) is None for row in rows):
        return dict(batch)
    reals, labels = real_tokens(batch), []
    for row, real, first in zip(rows, reals, before.tolist(), strict=True):
        values, tokens = torch.as_tensor(row[key]), len(row["input_ids"])
        own = real[first : first + tokens]
        if values.shape == (int(own.sum()),):  # none for padding that the row came with
            values = torch.full((tokens,), IGNORED).masked_scatter(own, values.long())
        if values.shape != (tokens,):
            raise ValueError(
                f"a row has {tokens} tokens, but labels of shape {tuple(values.shape)}; give each "
                f"token one, {IGNORED} where there is none"
            )
        labels.append(values)
    return {**batch, key: in_places(labels, before, reals.shape[1], IGNORED)}
