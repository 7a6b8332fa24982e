"""Which tensors are trained, and which no factor covers."""

import logging

import pytest
import torch
from peft import PeftModel
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.models import base_model, peft_model
from support.references import assert_near


def test_models_without_a_trainable_adapter():
    model = peft_model("bert")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        KronLoraLaplace(model.get_base_model(), "classification")


@pytest.mark.parametrize(
    ("name", "kwargs", "leftover"),
    [
        ("bert", {"bias": "all"}, "LayerNorm.bias"),
        ("bert", {"use_dora": True}, "lora_magnitude_vector"),
        ("bert", {"target_modules": ["word_embeddings"], "use_dora": True}, "lora_embedding_A"),
    ],
)
def test_trainable_tensors_that_no_factor_covers_are_named(name, kwargs, leftover):
    model = peft_model(name, **kwargs)
    with pytest.raises(ValueError, match=rf"(?s)no Kronecker factor covers.*{leftover}.*Freeze"):
        KronLoraLaplace(model, "classification")


def test_tied_trainable_weights_are_named():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' are shared by several modules"):
        LoraGGN(net, "classification")


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_adapters_loaded_for_inference_just_work(name, tmp_path, caplog):
    trained = peft_model(name, dtype=torch.float32)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with caplog.at_level(logging.INFO, logger="laplace_lora"):
        wrapped = LogitsModel(loaded).eval()
    assert "trainable" in caplog.text
    expected = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == expected
    batch = token_batch((5, 5))
    assert_near(wrapped(batch), LogitsModel(trained).eval()(batch))
    assert LoraGGN(wrapped, "classification").kron(batch, batch["labels"], N=2)[0].isfinite()


def test_a_trainable_adapter_is_left_as_it_is(caplog):
    model = peft_model("bert")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    before = [name for name, p in model.named_parameters() if p.requires_grad]
    with caplog.at_level(logging.INFO, logger="laplace_lora"):
        LogitsModel(model)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == before
    assert not caplog.text


@pytest.mark.parametrize("rank", [1, 4])
def test_an_adapter_of_another_rank_that_was_swapped_in_is_fitted_as_if_loaded(rank, tmp_path):
    """PEFT leaves the layers' sizes as they were; a larger rank ended in an IndexError."""
    model = peft_model("bert", r=2, modules_to_save=None)
    loaded = peft_model("bert", r=rank, modules_to_save=None)
    loaded.save_pretrained(tmp_path)
    hotswap_adapter(model, tmp_path, adapter_name="default")
    batch, found = token_batch((4, 2)), []
    for each in (model, loaded):
        la = KronLoraLaplace(each, "classification")
        la.fit(loader())
        found += [la(batch), la.log_marginal_likelihood()]
    assert_near(found[0], found[2])
    assert_near(found[1], found[3])
