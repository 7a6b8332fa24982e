"""Modules are chosen, and factors paired, by whole parts of their names."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from laplace_lora.functional import (
    calculate_kronecker_factors,
    jacobian_mean,
    register_hooks,
    variance,
)
from support.batches import token_batch
from support.functional import Named, factors_of
from support.models import peft_model
from support.references import assert_near


@pytest.mark.parametrize(
    "keywords,names",
    [
        (["q"], ["q"]),
        (["layers.1"], ["layers.1"]),
        (["lora"], ["lora_A"]),
        (["LORA_a", "query"], ["query", "lora_A"]),
    ],
)
def test_modules_are_matched_by_whole_parts_of_their_names(keywords, names):
    data = [torch.randn(4, 3)]
    factors = calculate_kronecker_factors(
        Named(), lambda m, x: m(x), data, target_module_keywords=keywords
    )
    assert list(factors) == names


def test_factors_and_jacobians_are_paired_by_whole_names():
    model = Named()
    x = {"x": torch.randn(4, 3)}
    factors = calculate_kronecker_factors(
        model, lambda m, b: m(b["x"]), [x], target_module_keywords=["layers.1", "layers.11"]
    )
    jacobian, _ = jacobian_mean(model, x)
    f_var = variance(x, jacobian, factors, 1.0, 2, None, None, "cpu")
    shuffled = dict(reversed(jacobian.items()))
    assert_near(variance(x, shuffled, factors, 1.0, 2, None, None, "cpu"), f_var)
    prefixed = {f"wrapper.{key}": value for key, value in jacobian.items()}
    assert_near(variance(x, prefixed, factors, 1.0, 2, None, None, "cpu"), f_var)


@pytest.mark.parametrize("keywords", [["lora", "clasifier"], ["lora_", "classifier"], []])
def test_a_keyword_that_selects_nothing_is_refused(keywords):
    """Beside another that does, too; the head alone has most of the variance."""
    idle = [keyword for keyword in keywords if keyword not in ("lora", "classifier")]
    with pytest.raises(
        ValueError, match=rf"keywords={idle} select no .*match='substring'".replace("[", r"\[")
    ):
        factors_of(peft_model("bert"), "bert", keywords=keywords)
    if "lora_" in keywords:
        found = factors_of(peft_model("bert"), "bert", keywords=keywords, match="substring")
        assert len(found) == 9


@pytest.mark.parametrize("modules", [["word_embeddings", "query"], ["embedding", "conv", "head"]])
def test_trainable_tensors_without_a_factor_are_pointed_out(modules):
    if "query" in modules:
        model, x = peft_model("bert", target_modules=modules), token_batch((4, 2))
        call, left_out = lambda m, b: m(**b).logits, "word_embeddings.lora_embedding_A"
    else:
        model, x = (
            get_peft_model(Mixed(), LoraConfig(r=2, target_modules=modules)),
            torch.ones(2, 5).long(),
        )
        call, left_out = lambda m, x: m(x), "conv.lora_A"
    with pytest.warns(
        UserWarning, match=rf"{left_out}.* get no factors, so they count as fixed"
    ) as seen:
        found = calculate_kronecker_factors(model, call, [x], target_module_keywords=["lora"])
    assert seen[0].filename == __file__
    assert not any(part in name for name in found for part in ("embedding", "conv"))
    with pytest.warns(UserWarning, match=left_out):
        register_hooks(model, {}, {}, ["lora"])


class Mixed(nn.Module):
    """A model with layers that run, and with attention, whose adapter PEFT adds to its weights."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.conv = nn.Conv2d(1, 1, 1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.conv(self.embedding(x).unsqueeze(1)).squeeze(1)
        return self.head(self.attention(x, x, x)[0].mean(1))


@pytest.mark.parametrize("target", ["attention", "attention.out_proj"])
def test_adapters_that_do_not_run_as_layers_are_pointed_out_if_logits_depend_on_them(target):
    model = get_peft_model(Mixed(), LoraConfig(r=2, target_modules=[target, "head"]))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = calculate_kronecker_factors(
            model, lambda m, x: m(x), [torch.ones(2, 5).long()], target_module_keywords=["lora"]
        )
    assert len(found) == 2
    messages = [str(warning.message) for warning in seen]
    assert any("attention.lora_A" in text for text in messages) == (target == "attention")
