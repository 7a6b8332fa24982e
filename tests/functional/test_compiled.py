"""Compiled models: code that ran before does not look for hooks, so it runs as it was written."""

import pytest
import torch

from laplace_lora import LogitsModel
from laplace_lora.functional import calculate_kronecker_factors, register_hooks
from laplace_lora.models.changes.compiled import is_compiled
from support.batches import loader, token_batch
from support.functional import adapters_only, factors_of, gaussian
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
INPUTS = {key: value for key, value in BATCH.items() if key != "labels"}


def whole(model):
    return torch.compile(model, backend="eager")


def forward_pass(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def some_layers(model):
    for module in model.modules():
        if type(module).__name__ == "BertSelfAttention":
            module.compile(backend="eager")
    return model


def with_gradients(model):
    return model(**INPUTS).logits.sum().backward()


@pytest.fixture
def plain():
    return adapters_only("bert").eval()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize("way", [whole, forward_pass, some_layers])
def test_factors_and_predictions_are_those_of_the_model_as_it_was_written(way, plain):
    expected = factors_of(plain, "bert")
    mean, covariance = gaussian(plain, "bert", BATCH, expected)
    model = way(plain)
    with_gradients(model)
    before = [module for module in model.modules() if is_compiled(module)]
    factors = factors_of(model, "bert")
    assert factors.keys() == expected.keys()
    for name, pair in expected.items():
        for ours, theirs in zip(factors[name], pair, strict=True):
            assert_near(ours, theirs, 1e-12)
    f_mu, f_var = gaussian(model, "bert", BATCH, factors)
    assert_near(f_mu, mean, 1e-12)
    assert_near(f_var, covariance, 1e-12)
    assert before and before == [module for module in model.modules() if is_compiled(module)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", [whole, forward_pass, some_layers])
def test_hooks_see_every_layer_until_they_are_removed(way, plain):
    def sums(model):
        activations, output_grads = {}, {}
        with register_hooks(model, activations, output_grads, ["lora"], None):
            with_gradients(model)
        return {name: (activations[name][0], output_grads[name][0]) for name in activations}

    expected = sums(plain)
    model = way(plain)
    with_gradients(model)
    factors = sums(model)
    assert factors.keys() == expected.keys()
    for name, pair in expected.items():
        for ours, theirs in zip(factors[name], pair, strict=True):
            assert_near(ours, theirs, 1e-12)
    assert any(is_compiled(module) for module in model.modules())


def test_a_function_that_calls_another_model_is_refused(plain):
    other = LogitsModel(adapters_only("bert"))
    with pytest.raises(RuntimeError, match=r"none of the selected modules .*lora_A.* ran"):
        calculate_kronecker_factors(
            plain, lambda _, batch: other(batch), loader(), target_module_keywords=["lora"]
        )
