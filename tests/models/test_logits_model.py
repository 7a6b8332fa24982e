"""LogitsModel: the same logits as the model's own, from fewer rows and tokens."""

import re

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from laplace_lora import FullLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import loader, token_batch
from support.models import ARCHITECTURES, TARGETS, VOCABULARY, peft_model
from support.references import assert_near
from support.texts import stripping_tokenizer

LENGTHS = (3, 6, 4, 6, 1)
LANGUAGE_MODELS = ["llama-lm", "gpt2-lm"]
BATCH = token_batch((4, 2, 5), seed=3)


def inputs_of(batch):
    return {key: value for key, value in batch.items() if key != "labels"}


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if not name.endswith("-lm")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_classifiers_return_the_models_own_logits(name, side):
    model, batch = peft_model(name).eval(), token_batch(LENGTHS, pad_to=8, side=side)
    assert_near(LogitsModel(model)(batch), model(**inputs_of(batch)).logits)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_answers_follow_the_last_real_token(name, side):
    model, batch = peft_model(name).eval(), token_batch(LENGTHS, pad_to=8, side=side)
    logits = LogitsModel(model, target_ids=TARGETS)(batch)
    for n, length in enumerate(LENGTHS):
        alone = token_batch(LENGTHS)["input_ids"][n : n + 1, :length]
        expected = model(input_ids=alone).logits[0, -1, TARGETS]
        assert_near(logits[n], expected)


def test_seq2seq_answers_at_the_first_decoder_step():
    model, batch = peft_model("t5-lm").eval(), token_batch(LENGTHS)
    start = torch.zeros(len(LENGTHS), 1, dtype=torch.long)
    expected = model(**inputs_of(batch), decoder_input_ids=start).logits[:, 0, TARGETS]
    assert_near(LogitsModel(model, target_ids=TARGETS)(batch), expected)


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "t5-lm"])
def test_the_head_sees_one_token_and_makes_only_the_answers_rows(name):
    model = peft_model(name).eval()
    shapes = []
    head = model.get_base_model().get_output_embeddings()
    handle = head.register_forward_hook(lambda m, a, out: shapes.append((a[0].shape, out.shape)))
    LogitsModel(model, target_ids=TARGETS)(token_batch(LENGTHS))
    handle.remove()
    assert shapes == [((5, 1, 16), (5, 1, len(TARGETS)))]
    assert "forward" not in vars(head)


def test_an_adapter_on_the_vocabulary_head_is_part_of_the_logits():
    model = peft_model("llama-lm", target_modules=["q_proj", "lm_head"]).eval()
    batch = token_batch((5, 5))
    expected = model(**inputs_of(batch)).logits[:, -1, TARGETS]
    wrapped = LogitsModel(model, target_ids=TARGETS)
    assert_near(wrapped(batch), expected)
    maps = [linear.name for linear in LoraGGN(wrapped, "classification").maps]
    assert any("lm_head.lora_B" in name for name in maps)


def test_transformations_after_the_head_are_kept():
    model = peft_model("llama-lm").eval()
    base = model.get_base_model()
    plain = LogitsModel(model, target_ids=TARGETS)(token_batch((5, 5)))
    forward = base.forward

    def capped(*args, **kwargs):
        returned = forward(*args, **kwargs)
        returned.logits = torch.tanh(returned.logits / 3) * 3
        return returned

    base.forward = capped
    assert_near(
        LogitsModel(model, target_ids=TARGETS)(token_batch((5, 5))), torch.tanh(plain / 3) * 3
    )


def test_batches_may_be_encodings_dictionaries_or_pairs_without_labels():
    model = LogitsModel(peft_model("bert").eval())
    batch = token_batch((5, 5))
    expected = model(batch)
    assert_near(model(BatchEncoding(batch)), expected)
    assert_near(model(inputs_of(batch)), expected)
    assert_near(model(batch["input_ids"]), expected)  # no padding, so no mask is needed
    assert "labels" in batch


def test_batches_without_examples_are_refused():
    model = LogitsModel(nn.Identity())
    with pytest.raises(ValueError, match="no examples"):
        model({"pixel_values": torch.zeros(0, 3, 8, 8)})


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm", "t5-lm", "llama", "bert"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_rows_without_a_real_token_are_refused(name, side):
    answers = {"target_ids": TARGETS} if name.endswith("-lm") else {}
    model = LogitsModel(peft_model(name).eval(), **answers)
    batch = token_batch((4, 2, 5), side=side)
    batch["attention_mask"][1] = 0
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch have no real token"):
        model(batch)
    la = KronLoraLaplace(model, "classification")
    with pytest.raises(ValueError, match=r"rows \[1\] of the batch have no real token"):
        la.fit(DataLoader([BATCH, batch], batch_size=None))  # not only in the first batch


def test_preference_pairs_without_a_real_token_are_refused():
    model = LogitsModel(peft_model("llama", num_labels=1).eval())
    half = inputs_of(token_batch((4, 2)))
    names = ("chosen", "rejected")
    pair = {f"{key}_{name}": x.clone() for key, x in half.items() for name in names}
    pair["attention_mask_rejected"][0] = 0
    with pytest.raises(ValueError, match=r"rows \[0\] of the batch have no real token"):
        model(pair)


def test_an_output_callable_takes_what_the_model_returns():
    model = peft_model("bert").eval()
    wrapped = LogitsModel(model, output=lambda returned: returned.logits[:, :2] * 2)
    batch = token_batch((5, 5))
    assert_near(wrapped(batch), model(**inputs_of(batch)).logits[:, :2] * 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_logits_come_in_single_precision(dtype):
    assert (
        LogitsModel(peft_model("bert", dtype=dtype).eval())(token_batch((5, 5))).dtype
        == torch.float32
    )


def test_nothing_of_the_model_is_registered_twice():
    model = peft_model("llama-lm")
    wrapped = LogitsModel(model, target_ids=TARGETS)
    assert len(list(wrapped.parameters())) == len(list(model.parameters()))
    assert not [key for key in wrapped.state_dict() if "target_ids" in key]


@pytest.mark.parametrize(
    ("target_ids", "message"),
    [
        ([3], "two or more different"),
        ([3, 3], "two or more different"),
        ([3, VOCABULARY], "must lie in the vocabulary"),
        ([-1, 3], "must lie in the vocabulary"),
        ([0.5, 1.5], "two or more different integers"),
    ],
)
def test_target_ids_must_be_different_tokens_of_the_vocabulary(target_ids, message):
    with pytest.raises(ValueError, match=message):
        LogitsModel(peft_model("llama-lm"), target_ids=target_ids)


def test_the_advice_on_target_ids_holds_behind_a_template():
    tokenizer, prompt, answer = stripping_tokenizer(("is", "it", "yes")), "is it\n", "yes"
    with pytest.raises(ValueError) as error:
        LogitsModel(peft_model("llama-lm"), target_ids=[[1, 2], [3]])
    (advice,) = re.findall(r"`(tokenizer\(.*?\)\])`", str(error.value))
    named = {"tokenizer": tokenizer, "prompt": prompt, "answer": answer}
    token = eval(advice, named)
    assert [*tokenizer(prompt).input_ids, token] == tokenizer("is it\nyes").input_ids
    assert tokenizer.convert_ids_to_tokens(token) == "yes"


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16])
def test_target_ids_may_be_integers_of_any_size(dtype):
    model, batch = peft_model("llama-lm").eval(), token_batch((3, 5))
    expected = LogitsModel(model, target_ids=TARGETS)(batch)
    assert torch.equal(LogitsModel(model, torch.tensor(TARGETS).to(dtype))(batch), expected)


def test_target_ids_need_a_vocabulary_and_exclude_an_output():
    with pytest.raises(ValueError, match="has no vocabulary"):
        LogitsModel(peft_model("bert"), target_ids=TARGETS)
    with pytest.raises(ValueError, match="not both"):
        LogitsModel(peft_model("llama-lm"), target_ids=TARGETS, output=lambda out: out.logits)


def test_a_language_model_without_target_ids_is_refused_with_advice():
    backend = LoraGGN(LogitsModel(peft_model("llama-lm")).eval(), "classification")
    batch = token_batch((5, 5))
    with pytest.raises(ValueError, match="target_ids"):
        backend.jacobians(batch)


def test_the_head_is_restored_after_a_failure():
    model = peft_model("llama-lm").eval()
    wrapped = LogitsModel(model, target_ids=TARGETS)
    head = model.get_base_model().lm_head
    with pytest.raises(RuntimeError):
        wrapped({"input_ids": torch.ones(2, 3, 4, dtype=torch.long)})
    assert "forward" not in vars(head)
    assert not head._forward_pre_hooks
    assert wrapped(token_batch((5, 5))).shape == (2, 3)


def test_any_module_that_returns_a_tensor_will_do():
    net = nn.Linear(4, 3)
    X = torch.randn(2, 4)
    assert_near(LogitsModel(net)(X), net(X))


def test_logits_of_half_precision_models_are_wide():
    model = peft_model("bert", dtype=torch.float32).to(torch.bfloat16)
    assert LogitsModel(model)(BATCH).dtype == torch.float32


def test_probabilities_are_no_logits():
    for cls in (KronLoraLaplace, FullLoraLaplace):
        model = LogitsModel(peft_model("bert"), output=lambda out: out.logits.softmax(-1))
        with pytest.raises(ValueError, match="the model returned probabilities"):
            cls(model, "classification").fit(loader())
    model = LogitsModel(peft_model("bert"), output=lambda out: out.logits.softmax(-1))
    KronLoraLaplace(model, "regression").fit(loader(likelihood="regression"))
