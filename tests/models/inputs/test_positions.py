"""Positions and lengths that a model counts in its own way, against its own plain passes."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.func import functional_call, vmap
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertForMaskedLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.evaluation import MAP
from laplace_lora.models.inputs.positions import PositionRule, real_positions
from laplace_lora.models.wrapped_model import places_of
from support.batches import loader, rows, token_batch
from support.models import PAD, TARGETS, base_model, bert_config, excite, peft_model
from support.references import assert_near, looped_jacobians
from support.vision import VISION, question, vision_model

LENGTHS = (6, 3, 5, 4)


def real_tokens(batch, n):
    return batch["input_ids"][n][batch["attention_mask"][n].bool()][None]


@torch.no_grad()
def after_last(model, batch):
    """One text at a time, without padding, by the model itself."""
    texts = [real_tokens(batch, n) for n in range(len(batch["input_ids"]))]
    return torch.stack([model(input_ids=ids).logits[0, -1, TARGETS] for ids in texts])


def roberta(**kwargs):
    torch.manual_seed(0)
    base = RobertaForCausalLM(bert_config(RobertaConfig, is_decoder=True, **kwargs))
    return excite(get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))).double()


MODELS = {
    "roberta": roberta,
    "llama": lambda: peft_model("llama-lm"),
    "gpt2": lambda: peft_model("gpt2-lm"),
}


@pytest.mark.parametrize("pad_to", [None, 9])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_each_text_alone(name, side, pad_to):
    model = MODELS[name]().eval()
    batch = token_batch(LENGTHS, side=side, pad_to=pad_to)
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    assert_near(wrapped(batch), after_last(model, batch))
    LoraGGN(wrapped, "classification").jacobians(batch)  # verified on the way


@pytest.mark.parametrize("real", [2, 1.0, True])
def test_masks_may_say_with_any_number_that_a_token_is_real(real):
    model = peft_model("gpt2-lm").eval()
    batch = token_batch(LENGTHS, side="left")
    mask = batch["attention_mask"]
    expected = after_last(model, batch)
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    wrapped(batch)  # settles that it must be told positions
    batch["attention_mask"] = mask.bool() if real is True else mask * real
    assert_near(wrapped(batch).detach(), expected)
    assert torch.equal(real_positions(batch["attention_mask"]), real_positions(mask))


def test_positions_are_tried_outside_of_a_recorded_pass():
    """Recording counts the calls of each layer, of which the trial must add none."""
    model = peft_model("gpt2-lm").eval()
    batch = token_batch(LENGTHS, side="left")
    fresh = LogitsModel(model, target_ids=TARGETS).eval()
    jacobians, _ = LoraGGN(fresh, "classification", verify=False).jacobians(batch)
    assert_near(jacobians, looped_jacobians(fresh, batch))


def test_nan_settles_nothing_about_positions():
    """Some models give NaN where padding stands before a text; masks may be changed for them."""
    rule, mask = PositionRule(True), token_batch((2, 4), side="left")["attention_mask"]

    def run(inputs):
        padded = bool((inputs["attention_mask"] == 0).any())
        return torch.full((1, 4, 3), float("nan") if padded else 1.0)

    for _ in range(2):
        inputs = {"attention_mask": mask}
        rule.apply(inputs, run, lambda: torch.float64, settles=True)
        assert inputs["position_ids"].tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def bart():
    config = BartConfig(
        vocab_size=50,
        d_model=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        is_decoder=True,
        is_encoder_decoder=False,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=["fc1"])
    return excite(get_peft_model(BartForCausalLM(config), lora)).double().eval()


def prompted():
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    return excite(get_peft_model(base_model("gpt2-lm"), config), 0.5).double().eval()


@pytest.mark.parametrize("make", [bart, prompted])
def test_padding_that_is_counted_as_text_is_refused_before_it(make):
    """These decoders cannot be told positions, so padding before a text would move it."""
    model = make()
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    right = token_batch(LENGTHS)
    assert_near(wrapped(right).detach(), after_last(model, right))
    with pytest.raises(ValueError, match=r"padding before a text changes.*pad on the right"):
        wrapped(token_batch(LENGTHS, side="left"))
    assert_near(wrapped(token_batch((4, 4), side="left")), wrapped(token_batch((4, 4))))


@pytest.mark.parametrize("name", VISION)
def test_images_are_counted_as_the_model_counts_them(name):
    kind, config, vision = VISION[name]
    model = vision_model(kind, config, **vision)
    questions = [question(answer) for answer in range(3)]
    batch = {key: torch.cat([q[key] for q in questions]) for key in questions[0]}
    with torch.no_grad():
        alone = torch.cat([model(**q).logits[:, -1, TARGETS] for q in questions])
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS)
    assert_near(la.logits_model(batch).detach(), alone, 1e-5)
    labelled = [{**batch, "labels": torch.arange(3)}]
    la.fit(torch.utils.data.DataLoader(labelled, batch_size=None))
    assert la.n_data == 3
    assert la.estimate_memory(batch).activations > 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_prompt_tuning_reads_the_token_that_the_model_reads(side):
    batch = token_batch(LENGTHS, side=side)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    model = excite(get_peft_model(base_model("llama"), config), 0.5).double().eval()
    own = model(**inputs).logits
    assert_near(LogitsModel(model)(batch), own)
    assert_near(MAP(model)(batch), own.softmax(-1))
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    with pytest.warns(UserWarning, match="answers a padded text otherwise"):
        la.fit(loader())  # as it reads the last of all tokens
    assert_near(la._glm_predictive_distribution(batch)[0], own)
    assert_near(la.backend.jacobians(batch)[0], looped_jacobians(la.logits_model, batch))


def test_prompt_tuning_answers_after_the_last_real_token():
    batch = token_batch(LENGTHS)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = excite(get_peft_model(base_model("llama-lm"), config), 0.5).double().eval()
    assert_near(LogitsModel(model, target_ids=TARGETS)(batch).detach(), after_last(model, batch))


MASK = 49


def masked_texts():
    batch = token_batch(LENGTHS)
    batch["input_ids"][batch["input_ids"] == MASK] = 3
    for n, place in enumerate((2, 0, 4, 1)):
        batch["input_ids"][n, place] = MASK
    return batch


def test_a_masked_language_model_answers_at_its_mask_token():
    torch.manual_seed(0)
    base = BertForMaskedLM(bert_config())
    model = excite(get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))).double().eval()
    batch = masked_texts()
    wrapped = LogitsModel(model, TARGETS, mask_token_id=MASK).eval()
    expected = []
    for n in range(len(LENGTHS)):
        ids = real_tokens(batch, n)
        place = int((ids[0] == MASK).nonzero())
        expected.append(model(input_ids=ids).logits[0, place, TARGETS])
    assert_near(wrapped(batch), torch.stack(expected))
    jacobians, _ = LoraGGN(wrapped, "classification").jacobians(batch)
    assert_near(jacobians, looped_jacobians(wrapped, batch))
    with pytest.raises(ValueError, match="mask_token_id=tokenizer"):
        LogitsModel(model, TARGETS)(batch)
    for ids in (torch.full((1, 3), MASK), torch.full((1, 3), 5)):
        with pytest.raises(ValueError, match="exactly one; text 0 has"):
            wrapped({"input_ids": ids})


def test_without_a_mask_all_tokens_are_real():
    model = peft_model("llama-lm").eval()
    batch = rows(token_batch((5, 5)), slice(2))
    plain = LogitsModel(model, target_ids=TARGETS)({"input_ids": batch["input_ids"]})
    assert_near(LogitsModel(model, target_ids=TARGETS)(batch), plain)


@pytest.mark.parametrize("name, limit", [("gpt2", 32), ("bert", 32), ("roberta", 31 - PAD)])
def test_texts_beyond_the_last_position_are_refused(name, limit):
    model = LogitsModel(peft_model(name).eval())
    model(token_batch((limit,)))
    with pytest.raises(ValueError, match=f"has {limit + 1} tokens, .* has positions for {limit};"):
        model(token_batch((limit + 1,)))


def test_texts_beyond_an_offset_of_positions_are_refused():
    model = LogitsModel(bart(), target_ids=TARGETS)
    model(token_batch((32,)))
    with pytest.raises(ValueError, match="has 33 tokens, and BartForCausalLM has positions for 32"):
        model(token_batch((33,)))


def test_other_errors_of_a_model_are_its_own(monkeypatch):
    inner = peft_model("gpt2").eval()
    model = LogitsModel(inner)

    def fail(*args, **kwargs):
        raise RuntimeError("out of order")

    monkeypatch.setattr(inner.base_model.model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        model(token_batch((4,)))


def test_an_images_positions_are_no_limit_of_a_text():
    tower = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(17, 4)})
    assert places_of(torch.nn.ModuleDict({"vision_tower": tower})) is None
    assert places_of(torch.nn.ModuleDict({"decoder": tower})) == 17


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_transform_of_torch_func_may_come_first():
    """It has no numbers to compare, so that the model is tried later."""
    batch = token_batch((4, 2, 6), side="left")
    model = LogitsModel(peft_model("gpt2-lm"), target_ids=TARGETS).eval()
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    stacked = {k: torch.stack([p, p]) for k, p in weights.items()}
    found = vmap(lambda w: functional_call(model, w, (batch,)))(stacked)
    assert_near(found[1], model(batch))
