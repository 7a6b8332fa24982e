"""Layers of encoder-decoders: K-FAC's factors depend on neither text's padding.

The reference has no masks at all: texts without padding, one at a time.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    T5ForSequenceClassification,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from laplace_lora import KronLoraLaplace
from laplace_lora.capture.padding_verification import without_padding
from laplace_lora.capture.places import stacks
from laplace_lora.data.masks import token_mask
from support.architectures import TEXT, architecture
from support.batches import split_rows, token_batch
from support.models import TARGETS, bert_config, excite, peft_model, t5_config
from support.references import assert_near

ENCODER, DECODER = (6, 3, 5, 4), (3, 6, 2, 5)
PADDED = [(6, 6), (9, 9), (6, 8)]
KINDS = ["t5", "bart", "mbart", "marian", "pegasus", "m2m_100", "blenderbot", "plbart", "t5gemma"]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
HALF = {name: TEXT[name] for name in (*SIZES, *HEADS)} | {"sliding_window": 16}


def adapted(base, modules):
    return excite(get_peft_model(base, LoraConfig(r=2, target_modules=modules))).double().eval()


def sequence_to_sequence(kind):
    config = {**TEXT, "final_logits_bias": None}
    if kind == "t5gemma":
        config = {"encoder": HALF, "decoder": HALF, "decoder_start_token_id": 0, "pad_token_id": 0}
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {kind}")
    return architecture("seq2seq", kind, config)


def of_two_berts():
    """Whose encoder is wider, so that a layer lies between the two."""
    torch.manual_seed(0)
    wide = bert_config(num_hidden_layers=1).to_dict() | {"hidden_size": 12}
    narrow = bert_config(num_hidden_layers=1, is_decoder=True, add_cross_attention=True).to_dict()
    config = EncoderDecoderConfig(encoder=wide, decoder=narrow)
    config.decoder_start_token_id = config.pad_token_id = 0
    base = EncoderDecoderModel(config)
    return adapted(base, ["query", "key", "value", "enc_to_dec_proj"])


def batch_of(encoder_pad=None, decoder_pad=None, has_mask=True, decoder=DECODER):
    text = token_batch(decoder, pad_to=decoder_pad, seed=3)
    batch = {**token_batch(ENCODER, pad_to=encoder_pad), "decoder_input_ids": text["input_ids"]}
    return {**batch, "decoder_attention_mask": text["attention_mask"]} if has_mask else batch


def cut(batch):
    """The examples of a batch one at a time, without padding and masks."""
    for row in split_rows(batch):
        masks = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}
        texts = {
            text: row[text][row[mask].bool()] if mask in row else row[text]
            for text, mask in masks.items()
            if text in row
        }
        yield {**{text: ids[None] for text, ids in texts.items()}, "labels": row["labels"][None]}


class Loader(list):
    dataset = range(len(ENCODER))


def factors(model, data, target_ids=TARGETS):
    la = KronLoraLaplace(model, "classification", target_ids=target_ids, factor_rank=None)
    la.fit(data if isinstance(data, Loader) else DataLoader(split_rows(data), batch_size=4))
    return [factor.matrix for pair in la.curvature.kfacs for factor in pair]


@pytest.mark.parametrize("kind", KINDS)
def test_both_texts_may_be_padded_to_one_length(kind):
    model = sequence_to_sequence(kind)
    expected = factors(model, Loader(cut(batch_of())))
    for lengths in PADDED:  # T5Gemma's attention rounds to float32, as processors differ in
        assert_near(factors(model, batch_of(*lengths)), expected, 1e-5)


def test_a_layer_between_the_two_reads_the_encoders_text():
    model = of_two_berts()
    expected = factors(model, Loader(cut(batch_of())))
    for lengths in PADDED:
        assert_near(factors(model, batch_of(*lengths)), expected)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("encoder_pad", [6, 9])
def test_without_a_mask_all_of_the_decoders_text_is_real(kind, encoder_pad):
    model = sequence_to_sequence(kind)
    batch = batch_of(encoder_pad, has_mask=False, decoder=(6, 6, 6, 6))
    assert_near(factors(model, batch), factors(model, Loader(cut(batch))))


@pytest.mark.parametrize("decoder_pad", [6, 9])
def test_without_a_mask_all_of_the_encoders_text_is_real(decoder_pad):
    batch = {**batch_of(None, decoder_pad), **token_batch((6, 6, 6, 6))}
    expected = factors(peft_model("t5-lm"), batch)
    del batch["attention_mask"]
    assert_near(factors(peft_model("t5-lm"), batch), expected)


@pytest.mark.parametrize("kind", [T5ForSequenceClassification, BartForSequenceClassification])
def test_a_model_that_makes_the_decoders_text_of_the_encoders_pads_both_alike(kind):
    torch.manual_seed(0)
    if kind is T5ForSequenceClassification:
        base = kind(t5_config(num_labels=3, eos_token_id=49))
    else:
        base = kind(BartConfig(**TEXT, num_labels=3))
    end = base.config.eos_token_id
    model = adapted(base, ["q", "v", "q_proj", "v_proj"])

    def batch(pad_to):
        batch = token_batch(ENCODER, pad_to=pad_to)
        ids, lengths = batch["input_ids"], torch.tensor(ENCODER)
        ids[ids == end] = 7
        ids[torch.arange(4), lengths - 1] = end
        return batch

    expected = factors(model, Loader(cut(batch(None))), None)
    for pad_to in (6, 9):
        assert_near(factors(model, batch(pad_to), None), expected)


class Nameless(nn.Module):
    """An encoder-decoder that does not say which of its layers are which."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, decoder_input_ids, decoder_attention_mask=None):
        mask = attention_mask.unsqueeze(-1)
        text = (torch.tanh(self.first(self.embed(input_ids))) * mask).sum(1, keepdim=True)
        logits = self.second(self.embed(decoder_input_ids) + text)
        return logits[:, 0]


def test_an_unknown_place_is_refused_where_it_matters():
    model = adapted(Nameless(), ["first", "second"])
    expected = factors(model, batch_of(8, 6), None)
    assert_near(factors(model, batch_of(6, 8), None), expected)
    with pytest.raises(RuntimeError, match=r"first.*encoder's tokens or at the decoder's"):
        factors(model, batch_of(6, 6), None)
    with pytest.raises(RuntimeError, match=r"first.*encoder's tokens or at the decoder's"):
        factors(model, batch_of(has_mask=False, decoder=(6, 6, 6, 6)), None)
    alike = batch_of(6, 6)
    alike["decoder_attention_mask"] = alike["attention_mask"]
    factors(model, alike, None)


def test_a_mask_without_the_others():
    batch, x = batch_of(6, 6), torch.zeros(4, 6, 2)
    del batch["attention_mask"]
    real = batch["decoder_attention_mask"].bool()
    assert token_mask(batch, x, "it", "encoder") is None
    assert torch.equal(token_mask(batch, x, "it", "decoder"), real)
    with pytest.raises(ValueError, match="'it' may stand"):
        token_mask(batch, x, "it")
    with pytest.raises(ValueError, match="'it' received 7 tokens"):
        token_mask(batch, torch.zeros(4, 7, 2), "it", "decoder")
    del batch["decoder_attention_mask"]
    assert token_mask(batch, x, "it") is token_mask(batch, x, "it", "decoder") is None


def test_only_whole_encoder_decoders_have_stacks():
    model = peft_model("t5-lm")
    whole, encoder, decoder = stacks(model)
    assert whole is model.get_base_model()
    assert (encoder, decoder) == (whole.encoder, whole.decoder)
    two = nn.ModuleList([model, peft_model("t5-lm")])
    for other in (two, encoder, BertModel(bert_config()), lambda batch: batch):
        assert stacks(other) is None


def test_a_single_text_loses_its_own_padding_only():
    row = {key: value[1:2] for key, value in batch_of(6, 6).items()}
    bare = without_padding(row)
    assert bare["input_ids"].shape == bare["attention_mask"].shape == (1, 3)
    assert torch.equal(bare["decoder_input_ids"], row["decoder_input_ids"])
    assert torch.equal(bare["decoder_attention_mask"], row["decoder_attention_mask"])
