"""Encoder-decoders of every kind, and what else a transformer may return."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertModel,
    MarianConfig,
    MarianMTModel,
    MBartConfig,
    MBartForConditionalGeneration,
    PegasusConfig,
    PegasusForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from support.batches import loader, split_rows, token_batch
from support.models import TARGETS, bert_config, excite, peft_model
from support.references import assert_near, looped_jacobians

SIZES = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
KINDS = {
    "bart": (BartForConditionalGeneration, BartConfig),
    "mbart": (MBartForConditionalGeneration, MBartConfig),
    "marian": (MarianMTModel, MarianConfig),
    "pegasus": (PegasusForConditionalGeneration, PegasusConfig),
}


def adapted(base, modules):
    return excite(get_peft_model(base, LoraConfig(r=2, target_modules=modules))).double().eval()


@pytest.mark.parametrize("name", KINDS)
def test_models_that_add_to_the_whole_vocabulary(name):
    torch.manual_seed(0)
    kind, config = KINDS[name]
    base = kind(config(max_position_embeddings=32, **SIZES))
    base.final_logits_bias.normal_()
    model, batch = adapted(base, ["q_proj", "v_proj"]), token_batch((6, 3, 5, 4))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    start = torch.full((4, 1), 2)
    own = model(**inputs, decoder_input_ids=start).logits[:, 0, TARGETS]
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    assert_near(wrapped(batch), own)
    backend = LoraGGN(wrapped, "classification", uncovered="diag")
    assert_near(backend.jacobians(batch)[0], looped_jacobians(wrapped, batch))


@pytest.fixture
def beginning():
    """BART, which writes the token 1 at every step, and inputs."""
    torch.manual_seed(0)
    base = BartForConditionalGeneration(BartConfig(max_position_embeddings=32, **SIZES))
    base.final_logits_bias[0, 1] = 1e3
    model, batch = adapted(base, ["q_proj", "v_proj"]), token_batch((6, 3, 5, 4))
    return model, {**batch, "labels": torch.tensor([0, 1, 0, 1])}


def test_a_model_that_begins_a_text_where_answers_are_read_is_pointed_out(beginning):
    model, batch = beginning
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS[:2])
    with pytest.warns(UserWarning, match=r"`decoder_input_ids`, with \[2, 1\] in each") as seen:
        la.fit(DataLoader(split_rows(batch), 4))
    assert len([w for w in seen if "decoder_input_ids" in str(w.message)]) == 1
    begun = torch.tensor([[2, 1]]).expand(4, 2)
    given = {**batch, "decoder_input_ids": begun}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    own = model(**inputs, decoder_input_ids=begun).logits[:, 1, TARGETS[:2]]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*decoder_input_ids")
        la.fit(DataLoader(split_rows(given), 4))
    assert_near(la.logits_model(given), own)


def test_a_first_token_that_is_an_answer_or_begins_nothing_is_not_pointed_out(beginning):
    model, batch = beginning
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*decoder_input_ids")
        KronLoraLaplace(model, "classification", target_ids=[1, 5]).fit(
            DataLoader(split_rows(batch), 4)
        )
        model.get_base_model().final_logits_bias[0] = 0.0
        KronLoraLaplace(model, "classification", target_ids=TARGETS[:2]).fit(
            DataLoader(split_rows(batch), 4)
        )


def test_speech_has_no_input_ids():
    torch.manual_seed(0)
    sizes = {**SIZES, "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12}
    model = adapted(WhisperForConditionalGeneration(WhisperConfig(**sizes)), ["q_proj", "v_proj"])
    features = torch.randn(3, 8, 20, dtype=torch.float64)
    batch = {"input_features": features, "labels": torch.arange(3)}
    start = torch.full((3, 1), 2)
    own = model(input_features=features, decoder_input_ids=start).logits[:, 0, TARGETS]
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    assert_near(wrapped(batch), own)
    assert_near(
        LoraGGN(wrapped, "classification").jacobians(batch)[0], looped_jacobians(wrapped, batch)
    )


def test_a_decoder_that_no_configuration_starts_is_refused():
    sizes = {**SIZES, "decoder_start_token_id": None}
    model = adapted(BartForConditionalGeneration(BartConfig(**sizes)), ["q_proj"])
    model.get_base_model().generation_config.decoder_start_token_id = None
    with pytest.raises(ValueError, match="says how its decoder starts"):
        LogitsModel(model, target_ids=TARGETS)(token_batch((3, 3)))


@pytest.mark.parametrize("name", ["t5-lm", "bart"])
def test_one_that_writes_text_is_refused_with_advice(name):
    if name == "bart":
        model = adapted(BartForConditionalGeneration(BartConfig(**SIZES)), ["q_proj"])
    else:
        model = peft_model(name)
    with pytest.raises(ValueError, match="writes text; give `target_ids`"):
        KronLoraLaplace(model, "classification").fit(loader())


def test_outputs_without_logits_are_refused_with_advice():
    model = adapted(BertModel(bert_config()), ["query"])
    with pytest.raises(ValueError, match="without `logits`; give LogitsModel an `output`"):
        KronLoraLaplace(model, "classification").fit(loader())


def test_a_configuration_that_asks_for_tuples_changes_nothing():
    """transformers' Llama itself fails with such a configuration."""
    model, batch = peft_model("bert").eval(), token_batch((6, 3))
    expected = LogitsModel(model)(batch)
    model.get_base_model().config.return_dict = False
    assert torch.equal(LogitsModel(model)(batch), expected)


@pytest.mark.parametrize("ids", [["yes", "no"], [True, False], "yes", [[1], [2]], [1.0, 2.0]])
def test_target_ids_of_other_types_are_refused(ids):
    with pytest.raises(ValueError, match="two or more different integers"):
        LogitsModel(peft_model("llama-lm"), target_ids=ids)


@pytest.mark.parametrize(
    "ids", [[[1, 2], [3, 4]], [[1, 2], [3]], [[1], [3]], [5, (6, 7)], torch.tensor([[1], [3]])]
)
def test_answers_of_several_tokens_are_told_what_they_may_be(ids):
    """As a tokenizer gives them for words."""
    with pytest.raises(ValueError, match=r"one, the one behind a prompt.*language_modeling"):
        LogitsModel(peft_model("llama-lm"), target_ids=ids)
    tensors = [torch.tensor(7), torch.tensor(9)]
    assert LogitsModel(peft_model("llama-lm"), target_ids=tensors).target_ids.tolist() == [7, 9]
