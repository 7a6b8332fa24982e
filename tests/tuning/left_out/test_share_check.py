"""Probabilities that a loss with class weights may have been meant to give."""

import warnings

import pytest
import torch

from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.tuning.left_out.share_check import APART, warn_if_shares_differ

N = 1000


def warned(likelihood, functions, labels):
    objective = likelihood_of(likelihood)
    scoring = objective.scoring(Link("quadrature"), 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_if_shares_differ(objective, scoring, functions, labels)
    return "".join(str(each.message) for each in caught)


@pytest.mark.parametrize("apart", [0.9 * APART, 1.1 * APART])
def test_a_class_with_too_much_probability(apart):
    share, given = 0.2, 0.2 + apart
    labels = (torch.arange(N) < share * N).long()
    contrast = torch.full((N, 1), given).double().logit()
    text = warned("classification", contrast, labels)
    assert bool(text) == (apart > APART)
    if text:
        assert f"a probability of {given:.2f} in mean, and 0.20 of the" in text or "0.80" in text
        assert "recentre=False" in text


def test_few_examples_may_differ_by_chance():
    labels = torch.tensor([1, 0, 0, 0])
    contrast = torch.zeros(4, 1).double()  # half and half, for a quarter
    assert not warned("classification", contrast, labels)
    assert warned("classification", contrast.repeat(50, 1), labels.repeat(50))


def test_pairs_and_targets_have_no_shares():
    far = torch.full((N, 1), 0.1).double()
    assert not warned("reward_modeling", far, torch.zeros(N).long())
    assert not warned("regression", far, far)


def test_unknown_labels_do_not_count():
    labels = torch.full((N, 2), -100)
    labels[: N // 2, 0] = (torch.arange(N // 2) < N // 4).long()
    functions = torch.zeros(N, 2).double()
    functions[N // 2 :] = 9.0  # of rows that nobody has labelled
    labels[: N // 2, 1] = (torch.arange(N // 2) < N // 20).long()
    text = warned("multilabel", functions, labels)
    assert "label 1 a probability of 0.50 in mean, and 0.10 of" in text
    for labels[: N // 2, 1] in (-100, 0, 1):  # not known, or always the same
        assert not warned("multilabel", functions, labels)
