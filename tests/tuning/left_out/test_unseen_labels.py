"""Labels that no training example has, and a mean that is moved all the same."""

import warnings

import pytest
import torch

from laplace_lora import FullLoraLaplace, KronLoraLaplace
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.tuning.left_out.unseen_labels import unseen_labels, with_unseen
from support.batches import loader
from support.models import peft_model

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)


def test_each_label_that_never_comes_is_charged():
    labels = torch.tensor([0, 2, 2, 0])
    softmax = likelihood_of("classification")
    assert [other.tolist() for other in unseen_labels(softmax, labels, 4)] == [[1] * 4, [3] * 4]
    assert unseen_labels(softmax, labels, 1) == []
    for name in ("regression", "reward_modeling"):
        assert unseen_labels(likelihood_of(name), labels.double(), 4) == []


def test_independent_labels_are_charged_one_by_one():
    labels = torch.tensor([[0, 1, -100, 1], [0, 0, -100, -100], [0, 1, -100, 1]])
    found = unseen_labels(likelihood_of("multilabel"), labels, 4)
    assert [other[0].tolist() for other in found] == [
        [1, -100, -100, -100],
        [-100, -100, -100, 0],
    ]
    assert all((other == other[0]).all() for other in found)


def test_the_charge_is_that_of_one_more_average_example():
    labels, other = torch.tensor([0, 0]), torch.tensor([1, 1])
    costs = {0: torch.tensor([0.1, 0.3]), 1: torch.tensor([2.0, 4.0])}
    charged = with_unseen(lambda f, y: f + costs[int(y[0])], labels, [other])
    assert charged(torch.zeros(2)).sum() == pytest.approx(0.1 + 0.3 + (2.0 + 4.0) / 2)


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
def test_labels_that_are_all_one_class_do_not_make_it_certain(cls):
    data = loader(4, LENGTHS)
    for row in data.dataset:
        row["labels"] = torch.zeros_like(row["labels"])
    la = cls(peft_model("bert", num_labels=2, dtype=torch.float64), "classification")
    la.fit(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the shares, which are as far apart as can be
        la.optimize_prior_precision()
    p = torch.cat([la(batch) for batch in data])
    assert 1 / 60 < float(p[:, 1].mean()) < 1 / 4  # about one in 12
