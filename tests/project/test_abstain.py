"""Choosing a confidence threshold for a risk, by hand-computed cases."""

import math

import pytest
import torch

from laplace_lora.evaluation import evaluate
from support.examples import imported


@pytest.fixture
def abstain(monkeypatch):
    return imported("abstain", monkeypatch)


P = torch.tensor([[0.95, 0.05], [0.9, 0.1], [0.8, 0.2], [0.8, 0.2], [0.6, 0.4]])


def test_the_lowest_threshold_that_keeps_the_risk(abstain):
    y = torch.tensor([0, 0, 0, 1, 0])  # one wrong answer, at confidence 0.8
    assert abstain.choose_threshold(P, y, 0.25) == pytest.approx(0.6)  # 1 of 5
    assert abstain.choose_threshold(P, y, 0.1) == pytest.approx(0.9)  # 0 of 2; 0.8 brings 1 of 4
    assert abstain.choose_threshold(P, torch.ones(5, dtype=torch.long), 0.1) == 2.0


def test_what_is_answered_above_a_threshold(abstain):
    y = torch.tensor([0, 0, 0, 1, 0])
    report = evaluate(lambda batch: batch["p"], [{"p": P, "labels": y}])
    found = abstain.answered(report, 0.8)
    assert found["coverage"] == 0.8 and found["risk"] == 0.25
    assert found["error"] == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
    assert found["confidence"] == pytest.approx(0.8625)
    assert abstain.answered(report, 2.0)["coverage"] == 0
    assert math.isnan(abstain.answered(report, 0.93)["error"])  # of a single answer
