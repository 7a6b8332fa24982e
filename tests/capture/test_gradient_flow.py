"""Base models whose layers let no gradient through are refused."""

import pytest
import torch
from torch import nn

from laplace_lora import KronLoraLaplace
from laplace_lora.functional import jacobian_mean
from support.batches import loader, token_batch
from support.functional import adapters_only, factors_of
from support.language import text_loader
from support.models import TARGETS, peft_model
from support.posteriors import LOW


class InferenceOnly(nn.Linear):
    """A linear layer as kernels for quantised inputs have it: its outputs carry no gradient."""

    def forward(self, x):
        return super().forward(x.detach()).detach()


def with_cut_layers(name, suffix, make=peft_model):
    """Return an adapted model some of whose frozen layers were replaced."""
    model = make(name)
    for path, module in model.named_modules():
        if path.endswith(suffix) and isinstance(module, nn.Linear):
            module.__class__ = InferenceOnly
    return model


@pytest.mark.parametrize(
    ("name", "suffix"), [("llama", "o_proj"), ("llama", "q_proj.base_layer"), ("bert", "dense")]
)
def test_layers_that_cut_the_gradient_are_named(name, suffix):
    la = KronLoraLaplace(with_cut_layers(name, suffix), "classification")
    hooks = [len(m._forward_hooks) for m in la.model.modules()]
    with pytest.raises(RuntimeError, match=rf"no gradient passes.*{suffix}.*InferenceOnly of"):
        la.fit(loader())
    assert [len(m._forward_hooks) for m in la.model.modules()] == hooks


def test_a_layer_that_no_adapter_precedes_may_cut_it():
    model = peft_model("llama")
    first = next(m for n, m in model.named_modules() if n.endswith("k_proj"))
    first.__class__ = InferenceOnly
    KronLoraLaplace(model, "classification").fit(loader())


def test_language_models_are_looked_at_too():
    model = with_cut_layers("llama-lm", "o_proj")
    with pytest.raises(RuntimeError, match="no gradient passes"):
        KronLoraLaplace(model, "language_modeling", **LOW).fit(text_loader())


def test_the_functional_interface_names_them_too():
    model = with_cut_layers("llama-lm", "o_proj", adapters_only)
    with pytest.raises(RuntimeError, match=r"no gradient passes.*o_proj"):
        factors_of(model, "llama-lm")
    with pytest.raises(RuntimeError, match=r"no gradient passes.*o_proj"):
        jacobian_mean(model, token_batch(), torch.tensor(TARGETS))
