"""Scores of extractive answers."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.evaluation.metrics import risks
from laplace_lora.predictive.span_predictions import SpanPredictions
from laplace_lora.tuning.validation.calibration_error import binary_expected_calibration_error

SMALLEST = torch.finfo(torch.float64).tiny  # so that the NLL is finite, as of classes


def span_metrics(predictions: SpanPredictions) -> dict[str, float]:
    """Return scores of predicted answers, each a mean over the questions.

    A question is answered by its best span, or by none where that is more probable, see
    `SpanPredictions.answer`. Source of the first two: Rajpurkar et al. (2016), arXiv:1606.05250,
    section 6.1; here of tokens, not of normalised words.

    Args:
        predictions: Of labelled questions.

    Returns:
        ``"exact match"``: whether start and end are right; ``"F1"``: of the answer's tokens;
        ``"NLL"``: of start and end together, in nats; ``"ECE"``: of the answer's probability
        against its being an exact match, 15 equal-width bins; ``"AURC"``: the mean error over all
        shares of questions that are answered, the most probable answers first.

    Raises:
        ValueError: If the questions have no labels.
    """
    labels, label_prob = predictions.labels, predictions.label_prob
    if labels is None or label_prob is None:
        raise ValueError("the questions have no labels; predict batches with their answers")
    answer, confidence = predictions.answer, predictions.confidence.double()
    exact = (answer == labels).all(1)
    return {
        "exact match": float(exact.double().mean()),
        "F1": float(_f1(answer, labels).mean()),
        "NLL": float(-label_prob.double().clamp(min=SMALLEST).log().mean()),
        "ECE": binary_expected_calibration_error(confidence, exact),
        "AURC": float(risks(confidence, ~exact)[1].mean()),
    }


def _f1(answer: Tensor, labels: Tensor) -> Tensor:
    """Return the F1 score of each answer's tokens, ``(questions,)``."""
    first = torch.maximum(answer[:, 0], labels[:, 0])
    last = torch.minimum(answer[:, 1], labels[:, 1])
    common = (last - first + 1).clamp(min=0).double()
    sizes = (answer[:, 1] - answer[:, 0] + 1) + (labels[:, 1] - labels[:, 0] + 1)
    return 2 * common / sizes
