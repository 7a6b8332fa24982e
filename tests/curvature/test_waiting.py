"""What an accelerator has to be asked for: as much with many adapted layers as with one."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from laplace_lora import KronLoraLaplace
from laplace_lora.curvature.batch_curvature import add_factors
from laplace_lora.linalg.factor_spec import FactorSpec
from support.batches import loader, token_batch
from support.models import peft_model


class Answers(TorchDispatchMode):
    """Counts the operations whose result the processor has to know."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if any(part in name for part in ("_local_scalar_dense", "nonzero", "aten.equal")):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def answers(work):
    work()
    with Answers() as found:
        work()
    return found.counts


def posterior(layers):
    adapted = list(range(layers))
    la = KronLoraLaplace(peft_model("llama", layers_to_transform=adapted), "classification")
    la.fit(loader())
    return la


@pytest.fixture(scope="module")
def depths():
    return [posterior(1), posterior(2)]


def test_a_fit_waits_as_often_in_a_deep_model(depths):
    batch = token_batch()
    y = batch["labels"]

    def work(la):
        return lambda: add_factors(la.engine, batch, y, FactorSpec())

    shallow, deep = (answers(work(la)) for la in depths)
    assert shallow == deep and shallow


def test_a_prediction_waits_as_often_in_a_deep_model(depths):
    batch = token_batch()
    shallow, deep = (answers(lambda la=la: la._glm_predictive_distribution(batch)) for la in depths)
    assert shallow == deep and shallow


def test_a_fit_walks_the_modules_once_for_its_checks_and_once_for_places(depths, monkeypatch):
    """A large model has thousands; an accelerator waits meanwhile."""
    la, batch, walked = depths[0], token_batch(), []
    walk = nn.Module.named_modules

    def counted(module, memo=None, prefix="", remove_duplicate=True):
        if module is la.model and memo is None:
            walked.append(module)
        return walk(module, memo, prefix, remove_duplicate)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    add_factors(la.engine, batch, batch["labels"], FactorSpec())
    assert len(walked) == 2


def test_where_padding_lies_is_asked_once(depths):
    batch = token_batch(lengths=(5, 3, 2, 5))
    y = batch["labels"]
    counts = answers(lambda: add_factors(depths[1].engine, batch, y, FactorSpec()))
    assert counts["aten.nonzero.default"] == 1


def test_unchanged_weights_are_compared_once(depths, monkeypatch):
    la = depths[0]
    la(token_batch())

    def refuse(*args):
        raise AssertionError("compared again")

    monkeypatch.setattr("laplace_lora.posteriors.weights_watch.are_equal", refuse)
    la(token_batch())
    with torch.no_grad():
        next(p for p in la.model.parameters() if p.requires_grad).add_(0.0)
    with pytest.raises(AssertionError, match="compared again"):
        la(token_batch())
