"""Predicting the answers of whole data sets, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.question_answering import END, START
from laplace_lora.predictive.data_sets import is_batch
from laplace_lora.predictive.inputs import batches_of_rows, batches_of_texts, listed
from laplace_lora.predictive.span_predictions import SpanPredictions
from laplace_lora.predictive.spans import SpanPredictor


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
        ValueError: If they are empty, or see `batches_of_texts` and `batches_of_rows`.
    """
    if is_batch(data):
        return _answer(predictor, data)
    kind, items = listed(data)
    if kind == "batches":
        return _of_batches(predictor, items, progress_bar)
    collate = batches_of_texts if kind == "texts" else batches_of_rows
    order, batches = collate(items, tokenizer, batch_size)
    return _of_batches(predictor, batches, progress_bar)[order.argsort()]


def _answer(predictor: SpanPredictor, batch: Any) -> SpanPredictions:
    """Return the spans of a batch, with its labels where it has any."""
    posterior = predictor.posterior
    labelled = isinstance(batch, Mapping) and ({START, END} <= set(batch))
    labelled = labelled or (isinstance(batch, Mapping) and posterior.label_key in batch)
    labelled = labelled or (isinstance(batch, Sequence) and len(batch) == 2)
    if not labelled:
        return predictor(batch)
    return predictor(*posterior.split(batch))


def _of_batches(
    predictor: SpanPredictor, source: Iterable[Any], progress_bar: bool | None
) -> SpanPredictions:
    posterior = predictor.posterior
    with together(source, device=posterior.device, runs=posterior.source) as team:
        batches = team.batches(source, "Predicting", progress_bar)
        parts = [_answer(predictor, batch) for batch in batches]
        columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(SpanPredictions)}
        whole = {name: c for name, c in columns.items() if all(v is not None for v in c)}
        joined: dict[str, Any] = team.rows(**whole)
        if not joined:
            raise ValueError("there is nothing to predict: the data are empty")
    return SpanPredictions(**joined)
