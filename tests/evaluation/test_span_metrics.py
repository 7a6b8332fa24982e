"""Scores of extractive answers, where they could go wrong without a word."""

import pytest
import torch

from laplace_lora.evaluation.spans import span_metrics
from laplace_lora.predictive.span_predictions import SpanPredictions


def predicted(probs, right):
    """Questions whose answer is the fifth token, or is not."""
    n = len(probs)
    place, nothing = torch.full((n,), 5), torch.zeros(n)
    prob = torch.tensor(probs)
    labels = torch.tensor([[5, 5] if r else [7, 7] for r in right])
    five = (place, place, prob, nothing, nothing)
    return SpanPredictions(
        torch.zeros(n).long(),
        *five,
        nothing,
        *five,
        labels=labels,
        label_prob=prob,
        map_label_prob=prob,
    )


def test_a_probability_that_rounding_took_beyond_one_changes_nothing():
    probs, right = [1.0, 1.0, 0.95, 0.7, 0.7, 0.3], [1, 0, 1, 1, 0, 0]
    # The first three share a bin, and so do the next two.
    expected = (abs(2.95 - 2) + abs(1.4 - 1) + 0.3) / 6
    assert span_metrics(predicted(probs, right))["ECE"] == pytest.approx(expected, abs=1e-6)
    above = [1.0000001, *probs[1:]]
    assert span_metrics(predicted(above, right))["ECE"] == pytest.approx(expected, abs=1e-6)


def test_answers_of_equal_probability_share_their_errors():
    probs = [0.9, 0.9, 0.9, 0.9, 0.5]
    for right in ([1, 1, 1, 0, 0], [0, 1, 1, 1, 0]):
        scores = span_metrics(predicted(probs, right))
        assert scores["AURC"] == pytest.approx((4 * 0.25 + (4 * 0.25 + 1) / 5) / 5)
