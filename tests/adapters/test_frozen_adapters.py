"""Adapters that run and are frozen, in a model of which something else is trainable."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BertModel
from transformers.integrations import peft as integration

from laplace_lora import FullLoraLaplace, KronLoraLaplace, KronLoraLLLaplace, LogitsModel
from support.batches import loader, token_batch
from support.models import base_model, bert_config, excite, peft_model
from support.posteriors import fitted

BATCH = token_batch((4, 2, 6), seed=9)
LORA = {"r": 2, "target_modules": ["query", "value"]}


def encoder():
    torch.manual_seed(0)
    return BertModel(bert_config()).double()


class Network(nn.Module):
    """A head of one's own behind an adapted encoder."""

    def __init__(self, adapted):
        super().__init__()
        torch.manual_seed(3)
        self.encoder, self.head = adapted, nn.Linear(16, 3).double()

    def forward(self, input_ids, attention_mask):
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        return self.head(found.last_hidden_state[:, 0])


def wrapped(adapted):
    return LogitsModel(Network(adapted), output=lambda logits: logits)


def test_an_adapter_loaded_into_ones_own_network_is_pointed_out(tmp_path):
    trained = excite(get_peft_model(encoder(), LoraConfig(**LORA))).double()
    trained.save_pretrained(tmp_path)
    la = FullLoraLaplace(wrapped(trained), "classification")
    la.fit(loader())
    frozen = PeftModel.from_pretrained(encoder(), tmp_path)
    model = wrapped(frozen)
    with pytest.warns(UserWarning, match=r"covers only 'head.weight', 'head.bias'.*set_adapter"):
        of_head = FullLoraLaplace(model, "classification")
    assert of_head.n_params == 51 < la.n_params
    frozen.set_adapter("default")
    again = FullLoraLaplace(model, "classification")
    again.fit(loader())
    assert again.block_names == la.block_names and torch.equal(again(BATCH), la(BATCH))


def test_an_adapter_that_transformers_loaded_is_pointed_out(tmp_path, monkeypatch):
    """It freezes the adapter, though not the head that was trained with it."""
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.18.0")  # newer than PEFT by one
    model = base_model("bert").double()
    model.add_adapter(LoraConfig(**LORA, modules_to_save=["classifier"]))
    la = fitted(model=excite(model))
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = base_model("bert").double()
    loaded.load_adapter(str(tmp_path))
    head = loaded.classifier.modules_to_save["default"].weight
    if not torch.equal(head, model.classifier.modules_to_save["default"].weight):
        pytest.skip("this version of transformers does not load the head")
    with pytest.warns(UserWarning, match=r"covers only 'classifier.modules_to_save"):
        KronLoraLaplace(loaded, "classification")
    with pytest.raises(ValueError, match=r"query\.lora_A.*it is frozen in the model; make it"):
        KronLoraLaplace.from_pretrained(loaded, tmp_path)
    loaded.set_adapter("default")
    assert torch.equal(KronLoraLaplace.from_pretrained(loaded, tmp_path)(BATCH), la(BATCH))


def test_nothing_is_said_where_a_part_was_asked_for(tmp_path):
    """Warnings are errors here."""
    model = peft_model("bert")
    KronLoraLaplace(model, "classification", modules=["classifier"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    KronLoraLaplace(model, "classification")
    for name, p in model.named_parameters():
        p.requires_grad_("classifier.modules_to_save" in name)
    KronLoraLLLaplace(model, "classification")
    KronLoraLaplace(model, "classification", modules=["classifier"])
    with pytest.warns(UserWarning, match="the adapter is frozen"):
        la = fitted(model=model)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
