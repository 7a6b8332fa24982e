"""Models of the last layer alone: one transformer, a head of its own."""

import copy

import pytest
import torch
from torch import nn

from laplace_lora import KronLoraLLLaplace, LogitsModel
from laplace_lora.models.last_layer_model import LastLayerModel
from support.batches import loader, token_batch
from support.last_layer import PLAIN, by_name, last_layer_logits_model
from support.models import TARGETS, peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 6), seed=9)


def test_the_transformer_exists_once():
    model = last_layer_logits_model("llama-lm")
    frozen = {p.data_ptr() for p in model.parameters()}
    head = model.head_tensors()[0].numel()
    for structure in PLAIN:
        for route in ("lora_last_layer", "last_layer"):
            if (structure, route) == ("gp", "last_layer"):
                continue
            la = by_name(model, structure, route)
            la.fit(loader())
            own = [p for p in la.model.parameters() if p.data_ptr() not in frozen]
            assert sum(p.numel() for p in own) == head
            assert sum(p.numel() for p in la.model.parameters()) == head


def test_a_copy_has_a_head_of_its_own_and_nothing_else():
    model = last_layer_logits_model("bert").eval()
    assert type(copy.deepcopy(model)) is LogitsModel
    split = LastLayerModel(model)
    duplicate = copy.deepcopy(split)
    assert_near(duplicate(BATCH), model(BATCH))
    with torch.no_grad():
        duplicate.head.weight.zero_()
    assert split.head.weight.any() and model.head_tensors()[0].any()
    assert duplicate.source is model


def test_heads_that_are_not_linear_are_refused():
    adapted = peft_model("llama-lm", target_modules=["q_proj", "lm_head"])
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(adapted, "classification", target_ids=TARGETS).fit(loader())
    transformed = LogitsModel(peft_model("bert"), output=lambda out: out.logits.tanh())
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(transformed, "classification").fit(loader())
    with pytest.raises(ValueError, match="no linear last layer"):
        KronLoraLLLaplace(LogitsModel(nn.Conv1d(2, 2, 1)), "classification")
    with pytest.raises(ValueError, match="cannot be differentiated"):
        KronLoraLLLaplace(peft_model("bert"), "classification", enable_backprop=True)
