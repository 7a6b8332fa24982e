"""Calibration metrics against hand-computed values."""

import itertools
import math

import pytest
import torch

from laplace_lora.evaluation.metrics import (
    METRICS,
    accuracy,
    accuracy_at,
    adaptive_ece,
    aurc,
    brier,
    debiased_ce,
    ece,
    nll,
    ood_auroc,
    ood_fpr95,
    risk_coverage,
)
from laplace_lora.likelihoods.information import entropy

P = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.4, 0.6], [0.55, 0.45]])
Y = torch.tensor([0, 1, 1, 1, 0])  # the second is wrong


def test_accuracy_nll_and_brier_by_hand():
    assert accuracy(P, Y) == pytest.approx(0.8)
    assert nll(P, Y) == pytest.approx(-sum(map(math.log, [0.9, 0.2, 0.7, 0.6, 0.55])) / 5)
    squares = [2 * 0.01, 2 * 0.64, 2 * 0.09, 2 * 0.16, 2 * 0.2025]
    assert brier(P, Y) == pytest.approx(sum(squares) / 5)


@pytest.mark.parametrize("name", ["accuracy", "adaptive ECE", "debiased CE", "AURC"])
def test_what_is_no_number_is_no_most_probable_class(name):
    with pytest.raises(ValueError, match=r"not numbers \(NaN\)"):
        METRICS[name](torch.tensor([[math.nan, 0.5], [0.5, 0.5]]), torch.tensor([0, 1]))


def test_nll_of_an_excluded_label_is_finite():
    assert 700 < nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) < 710


def test_calibration_errors_by_hand():
    # Each confidence falls into a bin of its own, so each contributes |correct - confidence| / 5.
    gaps = [0.1, 0.8, 0.3, 0.4, 0.45]
    assert ece(P, Y) == pytest.approx(sum(gaps) / 5)
    assert adaptive_ece(P, Y) == pytest.approx(sum(gaps) / 5)
    # Two examples in one bin cancel: confidence 0.8 twice, one right and one wrong.
    p, y = torch.tensor([[0.8, 0.2], [0.8, 0.2]]), torch.tensor([0, 1])
    assert ece(p, y) == pytest.approx(0.3)


def test_the_calibration_error_of_many_rows():
    """Sums of confidences in float32, one by one, are off by a hundred times as much."""
    generator = torch.Generator().manual_seed(0)
    confidence = 0.985 + 0.01 * torch.rand(300_000, generator=generator)
    p = torch.stack([confidence, 1 - confidence], dim=1)
    y = (torch.rand(len(p), generator=generator) > confidence).long()
    expected = (confidence.double().mean() - (y == 0).double().mean()).abs()  # all in one bin
    assert ece(p, y) == pytest.approx(float(expected), abs=1e-6)


@pytest.mark.parametrize("above", [1.0, 1 + 1e-7, 1 + 1e-9, 1 + 2e-16, 1.005])
def test_a_probability_that_rounding_took_beyond_one_changes_nothing(above):
    p = torch.tensor([[0.99, 0.01]] * 6 + [[1.0, 0.0]] * 4).double()
    y = torch.tensor([0] * 9 + [1])
    expected = abs((6 * 0.99 + 4 * 1) / 10 - 0.9)  # all in the last bin, 1 itself included
    p[6:] = torch.tensor([above, 1 - above])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert ece(p.to(dtype), y) == pytest.approx(expected, abs=3e-3)
    assert ece(p, y) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [1.02, -0.02, math.nan, math.inf])
def test_no_calibration_error_is_made_of_logits(bad):
    p = P.clone()
    p[2, 0] = bad
    with pytest.raises(ValueError, match="apply a softmax or sigmoid"):
        ece(p, Y)


def test_bins_of_equal_count_hold_neighbours_in_confidence():
    p = torch.tensor([[0.5 + 0.01 * i, 0.5 - 0.01 * i] for i in range(1, 31)])
    y = torch.arange(30) % 2  # every pair has one right and one wrong
    expected = sum(2 * abs(0.5 + 0.01 * (2 * i + 1.5) - 0.5) for i in range(15)) / 30
    assert adaptive_ece(p, y) == pytest.approx(expected, abs=1e-6)


def test_the_debiased_error_by_hand():
    # Two bins: at confidence 0.6 one of two is right, at 0.9 none of two.
    p = torch.tensor([[0.6, 0.4], [0.6, 0.4], [0.9, 0.1], [0.9, 0.1]])
    squares = [(0.5 - 0.6) ** 2 - 0.5 * 0.5 / (2 - 1), 0.9**2]
    assert debiased_ce(p, torch.tensor([0, 1, 1, 1])) == pytest.approx((sum(squares) / 2) ** 0.5)
    assert debiased_ce(p, torch.tensor([0, 1, 0, 0])) == 0  # less than the noise
    assert debiased_ce(p[:1], torch.tensor([0])) == pytest.approx(0.4)  # no variance to subtract


def test_a_perfect_model_has_no_debiased_error_on_average():
    generator = torch.Generator().manual_seed(0)
    squares, biased = [], []
    for _ in range(200):
        right = 0.5 + 0.5 * torch.rand(300, generator=generator)
        p = torch.stack([right, 1 - right], -1)
        y = (torch.rand(300, generator=generator) > right).long()
        squares.append(debiased_ce(p, y) ** 2)
        biased.append(adaptive_ece(p, y))
    assert sum(biased) / 200 > 0.06 and (sum(squares) / 200) ** 0.5 < 0.04
    assert 80 < sum(square == 0 for square in squares) < 140
    p = torch.tensor([[0.9, 0.1]] * 20000)
    y = torch.randint(2, (20000,), generator=generator)
    assert debiased_ce(p, y) == pytest.approx(0.4, abs=0.02)


def test_the_order_of_examples_of_equal_confidence_does_not_matter():
    p = torch.tensor([[0.9, 0.1]] * 100 + [[0.6, 0.4]] * 20)
    right = [1] * 90 + [0] * 10 + [1] * 6 + [0] * 14
    y = 1 - torch.tensor(right)
    shuffled = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    for order in (torch.arange(120), torch.arange(119, -1, -1), shuffled):
        # The 20 fill two bins and share one, where 8 of them meet nobody's gap but their own.
        assert adaptive_ece(p[order], y[order]) == pytest.approx(20 * 0.3 / 120)
        squares = 20 * (0.3**2 - 0.3 * 0.7 / 19) + 100 * (0 - 0.9 * 0.1 / 99)
        assert debiased_ce(p[order], y[order]) ** 2 == pytest.approx(squares / 120)


def test_the_debiased_square_of_equal_confidences_is_unbiased():
    """Its expectation over all draws of six labels, of which 0.3 are right on average."""
    p = torch.tensor([[0.95, 0.05]] * 6 + [[0.9, 0.1]] * 10).double()
    square = 0.0
    for right in itertools.product((0, 1), repeat=6):
        k = sum(right)
        y = torch.tensor([1 - r for r in right] + [1] * 10)
        square += 0.3**k * 0.7 ** (6 - k) * debiased_ce(p, y) ** 2
    assert square == pytest.approx((6 * (0.3 - 0.95) ** 2 + 10 * 0.9**2) / 16, rel=1e-6)


def test_bins_of_the_debiased_error_hold_two_examples_or_more():
    """Of one alone no variance would be subtracted."""
    levels = [0.6, 0.7, 0.7, 0.7, 0.8, 0.9, 0.9, 0.95]
    p = torch.tensor([[c, 1 - c] for c in levels]).double()
    y = torch.tensor([1, 1, 0, 1, 0, 0, 1, 1])
    total = 0.0
    for part in (slice(0, 4), slice(4, 8)):  # cuts at 2 and 6 would split, or leave one alone
        right, said = (1 - y[part]).double(), p[part, 0]
        total += 4 * ((right - said).mean() ** 2 - right.mean() * (1 - right.mean()) / 3)
    assert debiased_ce(p, y) == pytest.approx((float(total) / 8) ** 0.5)


def test_risk_coverage_by_hand():
    coverage, risk = risk_coverage(P, Y)
    assert coverage.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert risk.tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 4, 1 / 5])
    assert aurc(P, Y) == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 5)
    assert accuracy_at(0.4)(P, Y) == pytest.approx(0.5)
    assert accuracy_at(0.5)(P, Y) == pytest.approx(2 / 3)
    assert accuracy_at(1.0)(P, Y) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="coverage"):
        accuracy_at(0)


def test_examples_of_equal_confidence_share_their_errors():
    p = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.9, 0.1]])
    for y in ([0, 1, 0], [1, 0, 0]):
        assert risk_coverage(p, torch.tensor(y))[1].tolist() == pytest.approx([0, 0.25, 1 / 3])


def test_entropy_by_hand():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert entropy(p).tolist() == pytest.approx([math.log(2), 0])


def test_detection_by_hand():
    inside, outside = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.5, 4.0])
    # Of the six pairs five have the out-of-distribution example above.
    assert ood_auroc(inside, outside) == pytest.approx(5 / 6)
    # To accept 95 % of three one must accept all, up to 3: one of the two others passes.
    assert ood_fpr95(inside, outside) == pytest.approx(0.5)
    assert ood_auroc(inside, inside) == pytest.approx(0.5)


def test_equal_uncertainties_are_accepted_together():
    """Whatever their number: a sigmoid of equal numbers has other last digits in some places."""
    for n in range(1, 20):
        for others in range(1, min(40, 19 * n)):  # fewer than 95 % of those inside
            equal = torch.full((n,), 0.3)
            inside = torch.cat([torch.zeros(others), equal])
            outside = torch.cat([equal, torch.ones(others)])
            assert ood_fpr95(inside, outside) == pytest.approx(n / (n + others)), (n, others)


def test_detection_does_not_depend_on_the_scale_of_scores():
    inside, outside = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.25, 0.4])
    assert ood_auroc(100 * inside, 100 * outside) == ood_auroc(inside, outside)
