"""Gradients in float16 neither vanish nor overflow, whatever the scale of a model's outputs."""

import copy
import math

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.capture.gradient_scale import gradient_scale, is_out_of_range, measured_gain
from support.batches import loader, token_batch
from support.models import peft_model
from support.references import assert_near

HALF = torch.float16
BATCH = token_batch((3, 5, 4), seed=3)


@pytest.mark.parametrize("slope", [1e-9, 1e-4, 1.0, 3e4, 1e7])
def test_the_largest_gradient_comes_to_the_top_of_float16(slope):
    def sizes(sent):
        return [float((torch.tensor(sent).double() * slope).to(HALF))]

    gain = measured_gain(sizes)
    if slope == 1:
        assert gain is None
        return
    assert gain == pytest.approx(slope, rel=1e-2) or slope == 1e-9
    columns = torch.tensor([[[1.0], [0.25]]])
    scale = gradient_scale(columns, gain)
    assert math.frexp(scale)[0] == 0.5  # a power of two
    # What is sent backward has its limit as well.
    assert scale == 2**13 or 2**6 < scale * slope < 2**9
    assert gradient_scale(torch.zeros(1, 2, 1), gain) == 1


def test_what_is_sent_back_fits_as_well():
    for size in (1e-6, 3e4):
        assert 2**12 < gradient_scale(torch.full((2, 1, 1), size), 0.0) * size < 2**15


def test_when_gradients_are_scaled():
    assert not is_out_of_range([1.0, 0.01, 0.0])
    for sizes in ([0.0], [1.0, 1e-5], [3e3], [math.inf, 1.0], [math.nan]):
        assert is_out_of_range(sizes)


def scaled(name, scale, adapters=HALF):
    """A model in float16 whose outputs have a scale, and the same in float64."""
    model = peft_model(name, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "classifier" in key or "score" in key:
                parameter.mul_(scale)
    model = model.to(HALF)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = parameter.data.to(adapters)
    return model, copy.deepcopy(model).double()


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("adapters", [HALF, torch.float32])
@pytest.mark.parametrize("name,scale", [("llama", 1e-5), ("gpt2", 1e-5), ("llama", 1e4)])
def test_outputs_of_any_scale_have_their_curvature(name, scale, adapters, verify):
    """In these passes gradients became zero or infinite, or were taken for a misfit."""
    found = []
    for model in scaled(name, scale, adapters):
        la = DiagLoraLaplace(model, "regression", backend_kwargs={"verify": verify})
        la.fit(loader(likelihood="regression"))
        _, blocks = la.engine.jacobian_blocks(BATCH)
        found.append([*la.H.double().split(la.engine.sizes), *(block.double() for block in blocks)])
    for half, exact in zip(*found, strict=True):
        assert_near(half, exact, 2e-2)


def test_gradients_in_range_are_as_they_were(monkeypatch):
    model, _ = scaled("llama", 1.0)
    la = KronLoraLaplace(model, "regression")
    monkeypatch.setattr("laplace_lora.capture.tape.gradient_scale", None)
    la.fit(loader(likelihood="regression"))
    assert la.predict(BATCH).covariance.isfinite().all()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_small_outputs_under_autocast_are_no_misfit(name):
    """The check rounded to float16 what had been scaled to fit it."""
    model = peft_model(name, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "classifier" in key or "score" in key:
                parameter.mul_(1e-3)
    around, exact = (DiagLoraLaplace(m, "regression") for m in (model, copy.deepcopy(model)))
    exact.fit(loader(likelihood="regression"))
    with torch.autocast("cpu", HALF):
        around.fit(loader(likelihood="regression"))
    for found, expected in zip(
        *(la.H.split(la.engine.sizes) for la in (around, exact)), strict=True
    ):
        assert_near(found, expected, 2e-2)


def test_functions_of_the_outputs_are_scaled_as_well():
    """As a posterior that was loaded scores texts, before it has seen a batch of its own."""
    found = []
    for model in scaled("llama", 1e-5):
        la = DiagLoraLaplace(model, "regression")
        _, blocks = la.engine.jacobian_blocks(BATCH, function=lambda x, la=la: la.model(x)[:, :2])
        found.append([block.double() for block in blocks])
    for half, exact in zip(*found, strict=True):
        assert_near(half, exact, 2e-2)
