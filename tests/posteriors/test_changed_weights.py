"""A posterior notices at its next call that the model's weights are no longer those of the fit."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, KronLoraLLLaplace
from support.batches import loader, token_batch
from support.models import peft_model

BATCH = token_batch((4, 2, 5))


@pytest.mark.parametrize("kind", [KronLoraLaplace, DiagLoraLaplace, KronLoraLLLaplace])
def test_weights_that_were_trained_on_are_refused_until_they_come_back(kind, tmp_path):
    model = peft_model("bert")
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    name = "base_model.model.classifier.modules_to_save.default.weight"
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.get_parameter(name).add_(0.01)
    for call in (
        lambda: la(BATCH),
        lambda: la.predict(BATCH),
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(loader(), override=False),
    ):
        with pytest.raises(RuntimeError, match="have changed since the posterior was fitted"):
            call()
    model.load_state_dict(weights)
    assert torch.equal(la(BATCH), expected)


def test_a_new_fit_and_another_dtype_are_no_change():
    model = peft_model("bert", dtype=torch.float32)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    with torch.no_grad():
        for parameter in la.params:
            parameter.mul_(0.5)
    la.fit(loader())
    la(BATCH)
    model.to(torch.bfloat16)
    la(BATCH)


def test_rounding_is_no_change():
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float32), "classification")
    la.fit(loader())
    weight, before = la.params[0], la.params[0].detach().clone()
    with torch.no_grad():
        weight += 1
        weight -= 1
    assert not torch.equal(weight, before)
    la(BATCH)


@pytest.mark.parametrize("kind", [KronLoraLaplace, FullLoraLaplace, KronLoraLLLaplace])
def test_double_precision_is_another_model(kind):
    model = peft_model("bert", dtype=torch.float32)
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    model.double()
    with pytest.raises(RuntimeError, match="the posterior was fitted in"):
        la(BATCH)
    model.float()
    torch.testing.assert_close(la(BATCH), expected)


def rescale(model, factor):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", factor)


@pytest.mark.parametrize("kind", [KronLoraLaplace, FullLoraLaplace, KronLoraLLLaplace])
def test_another_scaling_of_the_adapter_is_refused_until_it_comes_back(kind, tmp_path):
    model = peft_model("bert")
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    rescale(model, 3.0)
    calls = (
        lambda: la(BATCH),
        la.optimize_prior_precision,
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(loader(), override=False),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"scaling of '.*query.* has changed since"):
            call()
    rescale(model, 1.0)
    assert torch.equal(la(BATCH), expected)


def test_a_state_keeps_the_scaling_of_its_fit(tmp_path):
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    state = la.state_dict()
    loaded = KronLoraLaplace.from_pretrained(model, tmp_path)
    rescale(model, 3.0)
    with pytest.raises(RuntimeError, match="scaling of"):
        loaded(BATCH)
    other = KronLoraLaplace(model, "classification")
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="scaling of"):
        other(BATCH)
    rescale(model, 1.0)
    assert torch.equal(other(BATCH), la(BATCH))
    other.load_state_dict({key: value for key, value in state.items() if key != "adapter"})
    assert torch.equal(other(BATCH), la(BATCH))
