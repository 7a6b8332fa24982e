"""Attention of grouped queries equals transformers' own."""

import pytest
import torch
from torch import nn
from torch.func import jvp
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import eager_attention_forward

from laplace_lora.adapters.grouped_attention import (
    NAME,
    differentiable_attention,
    grouped_attention,
)
from support.batches import token_batch
from support.models import base_model, llama_config


def llama(**kwargs):
    return LlamaForCausalLM(llama_config(**kwargs))


def gemma():
    sizes = llama_config().to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "pad_token_id")
    config = Gemma2Config(
        **{name: sizes[name] for name in names},
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=3,
        attn_logit_softcapping=0.05,
    )
    return Gemma2ForCausalLM(config)


@pytest.mark.parametrize("make", [llama, gemma])
def test_logits_equal_plain_attention(make):
    torch.manual_seed(0)
    model, batch = make().eval(), token_batch((4, 7, 2), pad_to=8, side="left")
    del batch["labels"]
    logits = []
    for name in ("eager", NAME):
        model.set_attn_implementation(name)
        logits.append(model(**batch).logits.detach()[batch["attention_mask"].bool()])
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("moves", ["nothing else", "everything"])
@pytest.mark.parametrize("heads_of_mask", [1, 4])
def test_a_mask_that_depends_on_the_weights_has_its_derivative(heads_of_mask, moves, in_double):
    torch.manual_seed(0)
    layer = llama(head_dim=6).model.layers[0].self_attn.eval()  # two queries to a key
    layer.num_key_value_groups = 2
    shapes = (2, heads_of_mask, 5, 5), (2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, 6)
    values, slopes = ([torch.randn(s).double() for s in shapes] for _ in range(2))
    fixed = values[1:] if moves == "nothing else" else []
    moving = len(values) - len(fixed)

    def run(attend):
        def output(*given):
            mask, query, key, value = (*given, *fixed)
            return attend(layer, query, key, value, mask, scaling=0.4)[0]

        return jvp(output, tuple(values[:moving]), tuple(slopes[:moving]))

    for ours, theirs in zip(run(grouped_attention), run(eager_attention_forward), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("length", [4, 9])
def test_values_may_be_of_another_length_than_keys(length):
    # As in the latent attention of DeepSeek.
    layer = llama().model.layers[0].self_attn.eval()
    layer.num_key_value_groups = 2
    shapes = (2, 4, 5, 6), (2, 2, 5, 6), (2, 2, 5, length)
    values, slopes = (tuple(torch.randn(s) for s in shapes) for _ in range(2))

    def run(attend):
        return jvp(lambda *given: attend(layer, *given, None, scaling=0.4)[0], values, slopes)

    for ours, theirs in zip(run(grouped_attention), run(eager_attention_forward), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_its_output_can_be_viewed_with_heads_side_by_side():
    query = torch.randn(2, 4, 5, 6)
    mixed, _ = grouped_attention(None, query, query[:, :2], query[:, :2], None)
    assert mixed.view(2, 5, 24).shape == (2, 5, 24)  # as JetMoE and AFMoE do


def test_only_models_with_grouped_queries_use_it():
    assert differentiable_attention(llama()) == NAME
    assert differentiable_attention(base_model("gpt2-lm")) == "eager"
    assert differentiable_attention(nn.Linear(2, 2)) == "eager"
    with_sinks = llama()
    with_sinks.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(2))
    assert differentiable_attention(with_sinks) == "eager"
