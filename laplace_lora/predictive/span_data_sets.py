"""Predicting the answers of whole data sets, in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import has_labels, is_inputs_and_labels
from laplace_lora.display.warning import warn
from laplace_lora.likelihoods.question_answering import CONTEXT, END, START
from laplace_lora.predictive.data_sets import is_batch, of_batches
from laplace_lora.predictive.inputs import batches_of_rows, in_places, kind_of
from laplace_lora.predictive.span_predictions import SpanPredictions
from laplace_lora.predictive.spans import SpanPredictor
from laplace_lora.predictive.texts import cut_texts, encoded


def predict_spans(
    predictor: SpanPredictor, data: Any, tokenizer: Any, batch_size: int, progress_bar: bool | None
) -> SpanPredictions:
    """Predict the answers of a data set, see `LoraLaplace.predict`.

    Args:
        predictor: Of a question-answering model's posterior.
        data: Pairs of question and context, rows or batches.
        tokenizer: The model's.
        batch_size: Pairs or rows per batch.
        progress_bar: Whether to show progress, see `progress`.

    Raises:
        TypeError: If the data are none of these.
        ValueError: If they are empty, a context does not fit its row, or see `_questions` and
            `batches_of_rows`.
    """
    answer = partial(_answer, predictor)
    if is_batch(data):
        return answer(data)
    place = (SpanPredictions, answer, predictor.posterior)
    kind, items = kind_of(data)
    if kind == "batches":
        return of_batches(*place, items, progress_bar)
    rows = _questions(items, tokenizer) if kind == "texts" else items
    padding: list[Tensor] = []

    def placed(batch: Any, part: Sequence[Mapping[str, Any]], before: Tensor) -> dict[str, Any]:
        padding.append(before)
        return _in_place(batch, part, before, (START, END, predictor.posterior.label_key))

    order, batches = batches_of_rows(rows, tokenizer, batch_size, CONTEXT, placed)
    found = of_batches(*place, batches, progress_bar).moved(-torch.cat(padding))
    return found[order.argsort()]


def _questions(texts: Sequence[Any], tokenizer: Any) -> list[Mapping[str, Any]]:
    """Return texts as rows, pairs with their context where no token types say which it is.

    Raises:
        ValueError: If nothing says where contexts are, or see `encoded`.

    Warns:
        UserWarning: If texts are too long and have lost a part.
    """
    rows = encoded(texts, tokenizer)
    cut = cut_texts(rows, texts, tokenizer)
    if cut:
        warn(
            f"texts {cut[:5]} have more tokens than the tokenizer's model_max_length="
            f"{tokenizer.model_max_length}, and no answer is found in what was cut off; give long "
            "contexts as several rows"
        )
    if any(1 in row.get("token_type_ids", ()) for row in rows):
        return rows
    if all(isinstance(text, str) for text in texts):
        return rows
    return [
        {**row, CONTEXT: _context(row, isinstance(text, str))}
        for row, text in zip(rows, texts, strict=True)
    ]


def _context(row: Any, is_single: bool) -> list[int]:
    """Return which tokens of a row are context: of a single text all behind the first."""
    if is_single:
        return [0] + [1] * (len(row["input_ids"]) - 1)
    try:
        parts = row.sequence_ids(0)
    except (AttributeError, ValueError):  # of tokenizers in Python
        raise ValueError(
            f"the tokenizer does not say which tokens are context: give rows with a {CONTEXT!r}, 1 "
            "where an answer may be, or use the fast tokenizer"
        ) from None
    return [int(part == 1) for part in parts]


def _in_place(
    batch: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    before: Tensor,
    names: Sequence[str],
) -> dict[str, Any]:
    """Return a padded batch with the labels and the contexts of its rows.

    Labels are places in a row.

    Raises:
        ValueError: If a context is missing where other rows have one, or does not fit its row.
    """
    labels = {name: torch.as_tensor(batch[name]) for name in names if name in batch}
    placed = {name: y + before.view(-1, *[1] * (y.ndim - 1)) for name, y in labels.items()}
    if any(CONTEXT in row for row in rows):
        contexts = [row.get(CONTEXT, ()) for row in rows]
        for row, context in zip(rows, contexts, strict=True):
            if len(context) != len(row["input_ids"]):
                raise ValueError(
                    f"a row of {len(row['input_ids'])} tokens has a {CONTEXT!r} of {len(context)}; "
                    "give every row one, with an entry per token"
                )
        placed[CONTEXT] = in_places(contexts, before, batch["input_ids"].shape[1], 0)
    return {**batch, **placed}


def _answer(predictor: SpanPredictor, batch: Any) -> SpanPredictions:
    """Return the spans of a batch, with its labels where it has any."""
    posterior = predictor.posterior
    has_places = all(has_labels(batch, name) for name in (START, END))
    if has_places or has_labels(batch, posterior.label_key):
        return predictor(*posterior.split(batch))
    return predictor(batch[0] if is_inputs_and_labels(batch) else batch)
