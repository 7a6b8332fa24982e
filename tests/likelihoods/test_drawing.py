"""Labels drawn with one random number each have the right distribution."""

import pytest
import torch

from laplace_lora.likelihoods.drawing import drawn_labels
from support.language import language_posterior

N = 40_000


def distribution(classes):
    p = (2 * torch.randn(classes, generator=torch.Generator().manual_seed(0))).softmax(0)
    if classes > 3:
        p[[0, classes // 2, classes - 1]] = 0.0
    return p  # no longer sums to one, which changes nothing


@pytest.mark.parametrize("count", [1, 50])
@pytest.mark.parametrize("classes", [1, 2, 3, 10, 16, 101])
def test_labels_are_as_frequent_as_their_probabilities_say(classes, count):
    torch.manual_seed(0)
    p = distribution(classes)
    drawn = drawn_labels(p.expand(N // count, classes), count)
    assert drawn.shape == (N // count, count)
    found = torch.bincount(drawn.flatten(), minlength=classes).double()
    expected = N * p.double() / p.double().sum()
    assert len(found) == classes and not found[expected == 0].any()
    deviations = ((found - expected) ** 2 / expected)[expected > 0]
    freedom = max(len(deviations) - 1, 1)
    assert deviations.sum() < freedom + 4 * (2 * freedom) ** 0.5  # χ² of labels drawn right


def test_rows_have_distributions_of_their_own():
    p = torch.eye(12)[[3, 11, 0]]
    assert drawn_labels(p, 2).tolist() == [[3, 3], [11, 11], [0, 0]]


def test_labels_of_one_row_are_independent():
    torch.manual_seed(0)
    first, second = drawn_labels(torch.full((N, 9), 1 / 9), 2).T
    pairs = torch.bincount(9 * first + second, minlength=81).double()
    assert ((pairs - N / 81) ** 2 / (N / 81)).sum() < 80 + 4 * 160**0.5


@pytest.mark.parametrize("number,label", [(0.0, 1), (1 - 2**-53, 8)])
def test_the_ends_are_drawn_from_classes_that_may_be(monkeypatch, number, label):
    p = distribution(10).unsqueeze(0)
    monkeypatch.setattr(torch, "rand", lambda *size, dtype: torch.full(size, number, dtype=dtype))
    assert drawn_labels(p, 1).item() == label


def test_a_fit_draws_no_number_for_every_word(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a random number for each class")

    monkeypatch.setattr(torch, "multinomial", refuse)
    assert language_posterior().n_data == 3
