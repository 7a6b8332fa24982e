"""Token ids in a bare tensor are read like those in a mapping: no check is passed by."""

import pytest
import torch
from laplace import Laplace
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
)
from laplace_lora.functional import calculate_kronecker_factors
from support.batches import images, split_rows, token_batch
from support.functional import adapters_only
from support.models import TARGETS, peft_model, resnet
from support.references import assert_near

PADDED = "begin or end with the padding token"
EQUAL, RAGGED = token_batch((5, 5, 5, 5)), token_batch((5, 3, 4, 2))
MODELS = ["llama", "gpt2", "bert", "llama-lm", "t5-lm"]


def pairs(batch):
    return DataLoader(TensorDataset(batch["input_ids"], batch["labels"]), batch_size=2)


def mappings(batch):
    return DataLoader(split_rows(batch), batch_size=2)


def answers(name):
    return {"target_ids": TARGETS} if name.endswith("-lm") else {}


@pytest.mark.parametrize("name", MODELS)
def test_kronecker_factors_do_not_count_padding_without_a_word(name):
    la = KronLoraLaplace(peft_model(name), "classification", **answers(name))
    with pytest.raises(ValueError, match=PADDED):
        la.fit(pairs(RAGGED))


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
@pytest.mark.parametrize("name", MODELS)
def test_the_evidence_is_that_of_mappings(name, cls):
    evidence = []
    for data in (pairs(EQUAL), mappings(EQUAL)):
        la = cls(peft_model(name), "classification", **answers(name))
        la.fit(data)
        evidence.append(la.log_marginal_likelihood())
    assert_near(*evidence)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_score_head_sees_the_token_that_it_classifies(name):
    factors = []
    for data in (pairs(EQUAL), mappings(EQUAL)):
        la = KronLoraLaplace(peft_model(name), "classification")
        la.fit(data)
        index = next(i for i, name in enumerate(la.block_names) if "score" in name)
        factors.append(la.curvature.kfacs[index][1].matrix)
    assert_near(*factors)


@pytest.mark.parametrize("name", ["llama-lm", "t5-lm"])
def test_answers_are_those_of_the_target_tokens(name):
    model = LogitsModel(peft_model(name), TARGETS).eval()
    assert_near(model(EQUAL["input_ids"]), model(EQUAL))
    assert_near(model.own_logits(EQUAL["input_ids"]), model.own_logits(EQUAL))


def test_answers_are_not_read_after_padding():
    with pytest.raises(ValueError, match=PADDED + ".*answer would be read after it"):
        LogitsModel(peft_model("llama-lm"), TARGETS)(RAGGED["input_ids"])


def test_an_encoder_decoder_without_answers_is_told_what_lacks():
    with pytest.raises(ValueError, match="writes text; give `target_ids`"):
        LogitsModel(peft_model("t5-lm"))(EQUAL["input_ids"])


@pytest.mark.parametrize("cls", [KronLoraLLLaplace, FullLoraLLLaplace])
@pytest.mark.parametrize("name", ["llama", "llama-lm"])
def test_last_layers(name, cls):
    found = []
    for data, batch in ((pairs(EQUAL), EQUAL["input_ids"]), (mappings(EQUAL), EQUAL)):
        la = cls(peft_model(name), "classification", **answers(name))
        la.fit(data)
        found.append((la.log_marginal_likelihood(), la(batch)))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs)


@pytest.mark.parametrize("name", ["llama", "t5-lm"])
def test_plain_laplace_torch(name):
    found = []
    for data, batch in ((pairs(EQUAL), EQUAL["input_ids"]), (mappings(EQUAL), EQUAL)):
        model = LogitsModel(peft_model(name), **answers(name))
        la = Laplace(model, "classification", "all", "kron", backend=LoraGGN)
        la.fit(data)
        found.append((la.log_marginal_likelihood(), la(batch, link_approx="probit")))
    for ours, theirs in zip(*found, strict=True):
        assert_near(ours, theirs)
    with pytest.raises(ValueError, match=PADDED):
        la.fit(pairs(RAGGED))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ["exact", "sampled"])
def test_predictions(name, method):
    la = KronLoraLaplace(peft_model(name), "classification", **answers(name))
    la.fit(mappings(EQUAL))
    assert_near(la(EQUAL["input_ids"], method=method), la(EQUAL, method=method))
    assert_near(la.predict(EQUAL["input_ids"], method=method).probs, la(EQUAL, method=method))


def test_the_functional_interface():
    model = adapters_only("bert")

    def factors(batch):
        data = DataLoader([(batch["input_ids"], batch["labels"])], batch_size=None)
        return calculate_kronecker_factors(
            model, lambda m, x: m(x[0]).logits, data, lr_threshold=99
        )

    factors(EQUAL)
    with pytest.raises(ValueError, match=PADDED):
        factors(RAGGED)


def test_other_tensors_stay_what_they_are():
    pixels = images()["pixel_values"]
    model = LogitsModel(resnet()).eval()
    for tensor in (pixels, pixels.to(torch.int64)):  # its first input is no text
        assert model.named(tensor) is tensor
    assert_near(model(pixels), model(images()))
    floats = EQUAL["input_ids"].double()
    assert LogitsModel(peft_model("bert")).named(floats) is floats
    assert LogitsModel(torch.nn.Embedding(50, 3)).named(EQUAL["input_ids"]) is EQUAL["input_ids"]
