"""Inputs are no longer than the model has positions for, and no shorter than it takes."""

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPVisionConfig,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from laplace_lora.commands.reading.tokenizers import check_length, longest_input
from laplace_lora.commands.reading.too_long import cut_to
from laplace_lora.models.wrapped_model import places_of
from support.command_line import refused, run
from support.on_disk import SIZES, tokenizer

GPT = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 16, "n_positions": 24}
T5 = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
OPT = {**SIZES, "ffn_dim": 32, "word_embed_proj_dim": 16}
RELATIVE = {**SIZES, "relative_attention": True, "position_biased_input": False}
WIDTHS = {name: SIZES[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}
EYES = CLIPVisionConfig(**WIDTHS, num_attention_heads=2, image_size=8, patch_size=4)
IMAGES = LlavaConfig(vision_config=EYES, text_config=LlamaConfig(**SIZES), image_token_index=1)
MODELS = {
    "table": (lambda: BertForSequenceClassification(BertConfig(**SIZES)), 24),
    "of GPT-2": (lambda: GPT2ForSequenceClassification(GPT2Config(**GPT)), 24),
    "after two rows": (lambda: OPTForCausalLM(OPTConfig(**OPT)), 24),
    "after the padding": (
        lambda: RobertaForSequenceClassification(RobertaConfig(**{**SIZES, "pad_token_id": 1})),
        22,
    ),
    "rotations": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), None),
    "relative": (lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**RELATIVE)), None),
    "inside": (lambda: LlavaForConditionalGeneration(IMAGES), None),
    "not declared": (lambda: T5ForConditionalGeneration(T5Config(**T5)), None),
}


@pytest.mark.parametrize("case", MODELS)
def test_the_limit_is_where_the_model_fails(case):
    make, expected = MODELS[case]
    model = make().eval()
    assert places_of(model) == expected
    words = tokenizer()
    words.model_max_length = int(1e30)
    longest = longest_input(words, model)
    assert longest == {"rotations": 24, "relative": 24, "inside": 24}.get(case, expected)

    def run_on(length):
        inputs = words(" ".join(["film"] * length), return_tensors="pt")
        more = {"decoder_input_ids": inputs["input_ids"][:, :1]} if case == "not declared" else {}
        model(**inputs, **more)

    run_on(expected or 30)
    check_length(expected, expected)
    check_length(None, expected)
    if expected is None:
        check_length(10**6, None)
        return
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        run_on(expected + 1)
    with pytest.raises(ValueError, match=f"positions for {expected} tokens; give {expected} or"):
        check_length(expected + 1, expected)


@pytest.mark.parametrize("command", ["fit", "doctor"])
def test_a_longer_input_is_refused_before_any_is_read(made, data, command):
    args = (command, made("classifier"), "--data", data("train"), "--max-length")
    message = refused(*args, 25)
    assert "--max-length 25: the model has positions for 24 tokens" in message


def test_a_model_without_a_table_takes_any_length(made, data):
    args = ("--target", "bad", "good", "--max-length", 32)
    run("doctor", made("decoder"), "--data", data("train"), *args)


@pytest.mark.parametrize("pair", [None, "was bad"])
def test_a_limit_that_leaves_no_room_for_a_text_is_refused(pair):
    words, own, texts = tokenizer(), 2 if pair is None else 3, 1 if pair is None else 2
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="[EOS] $A [EOS]", pair="[EOS] $A [EOS] $B [EOS]", special_tokens=[("[EOS]", 2)]
    )
    least = own + texts
    found = cut_to(least, "the film was good", pair, words, False)["input_ids"]
    assert len(found) == least and sum(token != 2 for token in found) == texts
    for limit in range(1, least):
        message = f"--max-length {limit} leaves no .* {own} tokens are .*; give {least} or more"
        with pytest.raises(ValueError, match=message):
            cut_to(limit, "the film was good", pair, words, False)
    with pytest.raises(ValueError, match="--max-length 1 leaves no room"):
        cut_to(1, "the film", None, tokenizer(), True)
    assert cut_to(2, "the film was", None, tokenizer(), True)["input_ids"] == [7, 2]
