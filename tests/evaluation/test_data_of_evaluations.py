"""Which labels an evaluation reads, and in which order it may be given groups."""

import math
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import FullLoraLLLaplace, KronLoraLaplace
from laplace_lora.evaluation import MAP, evaluate
from laplace_lora.evaluation.rows import model_of
from support.batches import loader
from support.models import peft_model


def relabelled():
    """Examples whose labels stand under another name, beside others called ``labels``."""
    data = loader()
    for row in data.dataset:
        row["target"] = row["labels"]
        row["labels"] = (row["labels"] + 1) % 3
    return data


def test_labels_are_those_of_the_posterior():
    la = KronLoraLaplace(peft_model("bert"), "classification", dict_key_y="target")
    la.fit(relabelled())
    truth = torch.stack([row["target"] for row in relabelled().dataset])
    quietly = partial(la.predict, progress_bar=False)
    for predict in (la, la.predict, quietly, partial(quietly, link_approx="probit")):
        assert torch.equal(evaluate(predict, relabelled(), bootstrap=2).labels, truth)
    others = evaluate(la, relabelled(), label_key="labels", bootstrap=2).labels
    assert torch.equal(others, (truth + 1) % 3)
    baseline = evaluate(MAP(la.logits_model), relabelled(), bootstrap=2)
    assert torch.equal(baseline.labels, others)


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLLLaplace])
def test_the_model_that_runs_has_the_transformer(cls):
    """A last-layer posterior's ``model`` has its head alone."""
    la = cls(peft_model("bert"), "classification")
    for predict in (la, la.predict, partial(la.predict, progress_bar=False)):
        assert model_of(predict) is la.logits_model
    assert model_of(MAP(la.logits_model)) is la.logits_model
    assert model_of(lambda batch: batch) is None


def test_groups_need_the_order_of_the_data():
    predict, data = MAP(peft_model("bert")), loader().dataset
    groups = [int(row["labels"]) for row in data]
    report = evaluate(predict, DataLoader(data, 3), groups=groups, bootstrap=2)
    assert {g: set(part.labels.tolist()) for g, part in report.by_group.items()} == {
        g: {g} for g in range(3)
    }
    shuffled = DataLoader(data, 3, shuffle=True)
    with pytest.raises(ValueError, match="data's loader draws its examples in random order"):
        evaluate(predict, shuffled, groups=groups, bootstrap=2)
    evaluate(predict, shuffled, bootstrap=2)
    hasty = DataLoader(data, 3, num_workers=2, in_order=False)
    with pytest.raises(ValueError, match="as its workers finish them"):
        evaluate(predict, hasty, groups=groups, bootstrap=2)


def test_groups_are_told_by_their_values():
    predict, data = MAP(peft_model("bert")), loader().dataset
    names = [1, "1", 1, "1", 1, 1, "1"][: len(data)]
    report = evaluate(predict, DataLoader(data, 3), groups=names, bootstrap=2)
    assert list(report.to_dict()["by_group"]) == ["1", "'1'"]
    tensors = [torch.tensor(float(name) if name == 1 else math.nan) for name in names]
    report = evaluate(predict, DataLoader(data, 3), groups=tensors, bootstrap=2)
    assert len(report.by_group) == 2 and 1.0 in report.by_group
