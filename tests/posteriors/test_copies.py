"""Copies of fitted posteriors: deep ones are equal and apart, pickling is refused."""

import copy
import io
import pickle

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LowRankLoraLaplace,
)
from support.batches import loader, token_batch
from support.models import peft_model

BATCH = token_batch((4, 2, 5), seed=3)
CLASSES = [
    KronLoraLaplace,
    DiagLoraLaplace,
    FullLoraLaplace,
    LowRankLoraLaplace,
    KronLoraLLLaplace,
]


def fitted(cls, **kwargs):
    la = cls(peft_model("bert"), "classification", **kwargs)
    la.fit(loader())
    la.optimize_prior_precision()
    return la


@pytest.mark.parametrize("cls", CLASSES)
def test_a_deep_copy_is_equal_and_apart(cls):
    la = fitted(cls)
    before = la(BATCH)
    twin = copy.deepcopy(la)
    assert torch.equal(twin(BATCH), before)
    with torch.no_grad():
        for parameter in twin.logits_model.parameters():
            parameter.add_(1)
    twin.prior_precision = 7.0
    assert torch.equal(la(BATCH), before) and la.prior_precision != 7
    with pytest.raises(RuntimeError, match="have changed since the posterior was fitted"):
        twin(BATCH)


@pytest.mark.parametrize("cls", [KronLoraLLLaplace, DiagLoraLLLaplace, FullLoraLLLaplace])
def test_a_last_layer_posterior_is_copied_after_samples_in_forward_mode(cls):
    la = fitted(cls)
    before = la.predict(BATCH, method="sampled").probs
    twin = copy.deepcopy(la)
    assert torch.equal(twin.predict(BATCH, method="sampled").probs, before)
    assert torch.equal(twin(BATCH), la(BATCH))


def test_a_deep_copy_covers_its_own_norms():
    model = peft_model("bert", modules_to_save=["classifier", "LayerNorm"])
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    assert torch.equal(copy.deepcopy(la)(BATCH), la(BATCH))


def test_rows_on_disk_are_copied(tmp_path):
    la = fitted(FullLoraLaplace, storage=tmp_path)
    twin, before = copy.deepcopy(la), la(BATCH)
    del la
    assert torch.equal(twin(BATCH), before)


def test_a_shallow_copy_shares_the_model_but_not_the_prior():
    la = fitted(KronLoraLaplace)
    twin = copy.copy(la)
    twin.prior_precision = 7.0
    assert twin.model is la.model and la.prior_precision != 7


def test_a_logits_model_copies_as_itself():
    model = LogitsModel(peft_model("llama-lm"), target_ids=[7, 11, 13]).eval()
    twin = copy.deepcopy(model)
    assert type(twin) is LogitsModel and twin.model is not model.model
    assert torch.equal(twin(BATCH), model(BATCH))


def test_pickling_is_refused_with_the_way_out():
    la = fitted(DiagLoraLaplace)
    with pytest.raises(TypeError, match="save_pretrained"):
        pickle.dumps(la)
    with pytest.raises(TypeError, match="save_pretrained"):
        torch.save(la, io.BytesIO())
