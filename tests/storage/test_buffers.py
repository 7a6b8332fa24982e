"""Running statistics are part of the function that a posterior belongs to."""

import copy
import json

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, KronLoraLLLaplace
from laplace_lora.adapters.frozen_values import buffer_places
from laplace_lora.storage.files import CONFIG, TENSORS, checksum
from support.batches import images, split_rows
from support.models import peft_model, resnet

BATCH = images(6)
SINGLE = {**BATCH, "pixel_values": BATCH["pixel_values"].float()}
LOADER = DataLoader(split_rows(BATCH), batch_size=3)


def fitted_on_images(cls=KronLoraLaplace, model=None):
    la = cls(model or resnet(), "classification")
    la.fit(LOADER)
    return la


def buffer_values(model):
    return {place.name: place.samples() for place in buffer_places(model)}


def train_statistics(model):
    """What training does to a model, all of whose weights may be frozen."""
    model.train()
    with torch.no_grad():
        model(pixel_values=3 * BATCH["pixel_values"] + 1)
    model.eval()


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, KronLoraLLLaplace])
def test_a_file_is_for_the_running_statistics_of_the_fit(cls, tmp_path):
    model, before = resnet(), resnet()
    train_statistics(model)
    la = fitted_on_images(cls, model)
    la.save_pretrained(tmp_path, precision="exact")
    with pytest.raises(ValueError, match=r"base model's buffers .* differ"):
        cls.from_pretrained(before, tmp_path)
    before.load_state_dict(model.state_dict())
    assert torch.equal(cls.from_pretrained(before, tmp_path)(BATCH), la(BATCH))


def test_a_base_model_in_bfloat16_has_the_statistics_of_the_fit(tmp_path):
    model = resnet().float()
    la = KronLoraLaplace(model, "classification")
    la.fit(DataLoader(split_rows(SINGLE), batch_size=3))
    la.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="rounded to a coarser dtype"):
        KronLoraLaplace.from_pretrained(model.to(torch.bfloat16), tmp_path)


def test_a_file_of_an_earlier_version_is_not_asked_for_them(tmp_path):
    la = fitted_on_images()
    la.save_pretrained(tmp_path, precision="exact")
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["buffers"], config["checksum"]
    (tmp_path / CONFIG).write_text(json.dumps({**config, "checksum": checksum(config)}))
    assert (tmp_path / TENSORS).exists()
    model = resnet()
    train_statistics(model)
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    train_statistics(model)
    with pytest.raises(RuntimeError, match=r"the buffers .* have changed"):
        again(BATCH)


def test_a_pass_in_training_mode_is_noticed_until_it_is_undone(tmp_path):
    la = fitted_on_images()
    model, expected = la.logits_model.model, la(BATCH)
    kept = copy.deepcopy(model.state_dict())
    train_statistics(model)
    other = fitted_on_images(model=resnet())
    for call in (
        lambda: la(BATCH),
        lambda: la.predict(BATCH),
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(LOADER, override=False),
        lambda: la.merge([other]),
    ):
        with pytest.raises(RuntimeError, match=r"running_mean.* have changed since"):
            call()
    model.load_state_dict(kept)
    assert torch.equal(la(BATCH), expected)
    train_statistics(model)
    la.fit(LOADER)
    assert not torch.equal(la(BATCH), expected)
    for module in model.modules():  # a change of dtype is none of values
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_mean.float()
    assert la.fitted.state is la.state


def test_posteriors_with_other_statistics_do_not_merge():
    model = resnet()
    train_statistics(model)
    with pytest.raises(ValueError, match=r"base model's buffers .* differ"):
        fitted_on_images().merge([fitted_on_images(model=model)])


def test_copies_and_state_dictionaries_know_them():
    la = fitted_on_images()
    twin, state = copy.deepcopy(la), la.state_dict()
    train_statistics(la.logits_model.model)
    twin(BATCH)
    fresh = KronLoraLaplace(la.logits_model.model, "classification")
    fresh.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"the buffers .* have changed"):
        fresh(BATCH)
    del state["buffers"]  # as earlier versions made them
    fresh.load_state_dict(state)
    fresh(BATCH)
    train_statistics(la.logits_model.model)
    with pytest.raises(RuntimeError, match=r"the buffers .* have changed"):
        fresh(BATCH)


def test_an_idle_adapter_brings_no_statistics_of_its_own(tmp_path):
    model = resnet()
    la = fitted_on_images(model=model)
    values, expected = buffer_values(model), la(BATCH)
    la.save_pretrained(tmp_path, precision="exact")
    embedder = "resnet.embedder.embedder.normalization"
    lora = LoraConfig(r=2, target_modules=["convolution"], modules_to_save=[embedder])
    model.add_adapter("idle", lora)
    model.set_adapter("default")
    model.eval()
    found = buffer_values(model)
    assert found.keys() == values.keys()
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert torch.equal(la(BATCH), expected)
    model.set_adapter("idle")
    copied = f"base_model.model.{embedder}.modules_to_save.idle.running_mean"
    assert copied in buffer_values(model) and len(buffer_values(model)) == len(values)


def test_what_is_left_out():
    """Rotary tables, which no checkpoint holds, and scales beside packed weights."""
    assert not buffer_places(peft_model("llama-lm")) and not buffer_places(peft_model("bert"))
    packed = nn.Linear(4, 4)
    packed.register_buffer("codes", torch.zeros(4, 4, dtype=torch.uint8))
    packed.register_buffer("scales", torch.ones(4))
    plain = nn.BatchNorm1d(3)
    names = [place.name for place in buffer_places(nn.Sequential(packed, plain))]
    assert names == ["1.running_mean", "1.running_var"]
    assert not buffer_places(nn.BatchNorm1d(3, track_running_stats=False))


def test_offloaded_buffers_are_not_compared():
    with torch.device("meta"):
        norm = nn.BatchNorm1d(3)
    assert [len(value) for value in buffer_values(norm).values()] == [0, 0]
