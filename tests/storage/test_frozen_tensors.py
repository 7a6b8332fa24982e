"""Posteriors of adapters of which a part was frozen at the fit, around the adapter as it loads."""

import pytest
import torch
from peft import PeftModel

from laplace_lora import KronLoraLaplace
from support.batches import loader, token_batch
from support.models import base_model, peft_model
from support.posteriors import fitted

BATCH = token_batch((4, 2, 6), seed=9)
FROZEN = {  # what it is a part of, and the part
    "lora_A": {},  # LoRA-FA
    "magnitude": {"use_dora": True},
    "LayerNorm": {"modules_to_save": ["classifier", "LayerNorm"]},
}


def saved(folder, part):
    model = peft_model("bert", **FROZEN[part])
    for name, p in model.named_parameters():
        if part in name:
            p.requires_grad_(False)
    la = fitted(model=model)
    model.save_pretrained(folder)
    la.save_pretrained(folder, precision="exact")
    return la


def loaded(folder, **kwargs):
    return PeftModel.from_pretrained(base_model("bert").double(), folder, **kwargs)


@pytest.mark.parametrize("part", FROZEN)
def test_they_cover_what_they_covered(tmp_path, part):
    la = saved(tmp_path, part)
    model = loaded(tmp_path)
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert again.block_names == la.block_names
    assert not any(part in name for name in again.block_names)
    assert torch.equal(again(BATCH), la(BATCH))
    assert all(p.requires_grad for n, p in model.named_parameters() if f"{part}.default" in n)
    again.fit(loader())
    assert again.block_names == la.block_names
    again.save_pretrained(tmp_path / "again")
    KronLoraLaplace.from_pretrained(model, tmp_path / "again")


def test_also_around_a_model_that_trains(tmp_path):
    """What the model trains stays trainable, and a new posterior covers it."""
    la = saved(tmp_path, "lora_A")
    model = loaded(tmp_path, is_trainable=True)
    flags = [p.requires_grad for p in model.parameters()]
    assert torch.equal(KronLoraLaplace.from_pretrained(model, tmp_path)(BATCH), la(BATCH))
    assert [p.requires_grad for p in model.parameters()] == flags
    assert KronLoraLaplace(model, "classification").n_layers == sum(flags) > la.n_layers


def test_also_beside_an_idle_adapter(tmp_path):
    """PEFT gives the base model's layers other names then."""
    la = saved(tmp_path, "lora_A")
    model = loaded(tmp_path)
    other = peft_model("bert", target_modules=["query", "key"]).peft_config["default"]
    model.add_adapter("other", other)
    assert torch.equal(KronLoraLaplace.from_pretrained(model, tmp_path)(BATCH), la(BATCH))


def test_other_values_of_what_was_frozen_are_refused(tmp_path):
    saved(tmp_path, "lora_A")
    model = loaded(tmp_path)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_A" in n).mul_(1.01)
    with pytest.raises(ValueError, match="other trained weights of the adapter have changed"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_tensors_of_the_base_model_are_not_left_out(tmp_path):
    """A file knows samples of them alone, and few rows of embeddings change."""
    la = fitted()
    model = la.logits_model.model
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path)
    again = loaded(tmp_path, is_trainable=True)
    again.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match="word_embeddings"):
        KronLoraLaplace.from_pretrained(again, tmp_path)


def test_what_is_frozen_now_and_was_covered_is_named(tmp_path):
    la = fitted()
    la.logits_model.model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path)
    model = loaded(tmp_path, is_trainable=True)
    for name, p in model.named_parameters():
        if "value.lora_A" in name:
            p.requires_grad_(False)
    with pytest.raises(ValueError, match=r"value\.lora_A.*is frozen in the model; make it"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_posteriors_of_other_tensors_do_not_merge(tmp_path):
    part = saved(tmp_path, "lora_A")
    whole = KronLoraLaplace(loaded(tmp_path), "classification")
    whole.fit(loader())
    with pytest.raises(ValueError, match=r"lora_A.*trains that one as well; freeze what"):
        part.merge([whole])
