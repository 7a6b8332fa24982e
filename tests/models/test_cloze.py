"""Masked language models with answer tokens: the answer is read at the mask token."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    ElectraConfig,
    ElectraForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, KronLoraLLLaplace, LogitsModel
from support.batches import rows, token_batch
from support.models import PAD, TARGETS, VOCABULARY, bert_config, excite, peft_model
from support.references import assert_near, looped_jacobians
from support.texts import word_tokenizer

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
MASK = 49
LENGTHS, PLACES = (5, 7, 4), (2, 0, 3)
distilbert = DistilBertConfig(
    vocab_size=VOCABULARY, dim=16, hidden_dim=24, n_heads=2, n_layers=2, pad_token_id=PAD
)
MODELS = {
    "bert": (BertForMaskedLM, bert_config(), ["query", "value"]),
    "roberta": (RobertaForMaskedLM, bert_config(RobertaConfig), ["query", "value"]),
    "distilbert": (DistilBertForMaskedLM, distilbert, ["q_lin", "v_lin"]),
    "albert": (AlbertForMaskedLM, bert_config(AlbertConfig, embedding_size=8), ["query"]),
    "electra": (ElectraForMaskedLM, bert_config(ElectraConfig, embedding_size=8), ["query"]),
    "deberta": (DebertaV2ForMaskedLM, bert_config(DebertaV2Config), ["value_proj"]),
}


def masked_model(name="bert"):
    kind, config, modules = MODELS[name]
    torch.manual_seed(0)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=modules)
    return excite(get_peft_model(kind(copy.deepcopy(config)), lora)).double().eval()


def cloze_batch(side="right", pad_to=8):
    """Texts with a mask token each, in different places."""
    batch = token_batch(LENGTHS, pad_to=pad_to, side=side)
    batch["input_ids"][batch["input_ids"] == MASK] = 3
    for n, place in enumerate(PLACES):
        start = 0 if side == "right" else pad_to - LENGTHS[n]
        batch["input_ids"][n, start + place] = MASK
    return batch


def cloze_loader(batch_size=2, **kwargs):
    batch = cloze_batch(**kwargs)
    return DataLoader([rows(batch, n) for n in range(len(LENGTHS))], batch_size=batch_size)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_the_models_own_logits_at_the_mask_token(name):
    model = masked_model(name)
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS, mask_token_id=MASK)
    batch = cloze_batch()
    own = [
        model(input_ids=batch["input_ids"][n : n + 1, :length]).logits[0, place, TARGETS]
        for n, (length, place) in enumerate(zip(LENGTHS, PLACES, strict=True))
    ]
    assert_near(la.model.eval()(batch), torch.stack(own))
    jacobians, _ = la.backend.jacobians(batch)
    assert_near(jacobians, looped_jacobians(la.model, batch))


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, KronLoraLLLaplace])
def test_fit_and_prediction_do_not_depend_on_batches_and_padding(cls):
    found = []
    for options in ({"batch_size": 3}, {"batch_size": 1}, {"pad_to": 9}):
        la = cls(masked_model(), "classification", target_ids=TARGETS, mask_token_id=MASK)
        la.fit(cloze_loader(**options))
        alone = torch.cat([la(batch) for batch in cloze_loader(1, pad_to=7)])
        found.append(torch.cat([alone.flatten(), la.log_marginal_likelihood().reshape(1)]))
    for other in found[1:]:
        assert_near(other, found[0])


@pytest.mark.parametrize("side", ["left", "right"])
def test_mask_tokens_of_the_padding_are_no_places_of_answers(side):
    model = LogitsModel(masked_model(), TARGETS, mask_token_id=MASK)
    batch = cloze_batch(side)
    expected = model(batch)
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, MASK)
    assert_near(model(batch), expected)


def test_texts_are_predicted_and_files_know_the_mask_token(tmp_path):
    tokenizer = word_tokenizer()
    mask = tokenizer.convert_tokens_to_ids("h")
    options = {"target_ids": [2, 3, 4], "mask_token_id": mask}
    la = KronLoraLaplace(masked_model(), "classification", **options)
    texts = ["a b h", "h c d e"]
    data = [{**tokenizer(text), "labels": n} for n, text in enumerate(texts)]
    padded = tokenizer.pad(data, return_tensors="pt")
    la.fit(DataLoader([rows(padded, n) for n in range(2)], batch_size=2))
    la.optimize_prior_precision(method="marglik")
    probs = la.predict(texts, tokenizer).probs
    assert probs.shape == (2, 3)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(masked_model(), tmp_path)
    assert torch.equal(again.predict(texts, tokenizer).probs, probs)
    wrapped = LogitsModel(masked_model(), [2, 3, 4], mask_token_id=mask)
    again = KronLoraLaplace.from_pretrained(wrapped, tmp_path)
    assert torch.equal(again.predict(texts, tokenizer).probs, probs)


def test_a_file_is_for_one_mask_token(tmp_path):
    la = DiagLoraLaplace(masked_model(), "classification", target_ids=TARGETS, mask_token_id=MASK)
    la.fit(cloze_loader())
    la.save_pretrained(tmp_path, precision="exact")
    with pytest.raises(ValueError, match=rf"mask_token_id={MASK}, and .* mask_token_id=4;"):
        DiagLoraLaplace.from_pretrained(
            LogitsModel(masked_model(), TARGETS, mask_token_id=4), tmp_path
        )
    with pytest.raises(ValueError, match=rf"mask_token_id={MASK}, and .* mask_token_id=None;"):
        DiagLoraLaplace.from_pretrained(LogitsModel(masked_model(), TARGETS), tmp_path)
    named = masked_model()
    named.config.mask_token_id = MASK
    again = DiagLoraLaplace.from_pretrained(LogitsModel(named, TARGETS), tmp_path)
    assert torch.equal(again(cloze_batch()), la(cloze_batch()))


def test_a_configuration_may_name_the_mask_token():
    model = masked_model()
    model.config.mask_token_id = MASK
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS)
    named = LogitsModel(masked_model(), TARGETS, mask_token_id=MASK).eval()
    assert_near(la.model.eval()(cloze_batch()), named(cloze_batch()))


def test_what_has_no_single_mask_token_is_refused():
    options = {"target_ids": TARGETS, "mask_token_id": MASK}
    la = KronLoraLaplace(masked_model(), "classification", **options)
    la.fit(cloze_loader())
    batch = {k: v for k, v in cloze_batch().items() if k != "labels"}
    for place, token, count in ((PLACES[1], 5, 0), (PLACES[1] + 1, MASK, 2)):
        ids = batch["input_ids"].clone()
        ids[1, place] = token
        with pytest.raises(ValueError, match=rf"exactly one; text 1 has {count}"):
            la({**batch, "input_ids": ids})
    with pytest.raises(ValueError, match="looked for in 'input_ids'"):
        la({"inputs_embeds": torch.zeros(1, 3, 16).double()})
    with pytest.raises(ValueError, match="mask_token_id=tokenizer"):
        la = KronLoraLaplace(masked_model(), "classification", target_ids=TARGETS)
        la.fit(cloze_loader())


def test_a_mask_token_without_effect_is_refused():
    for model, options in (
        (masked_model(), {}),
        (peft_model("llama-lm"), {"target_ids": TARGETS}),
        (peft_model("bert"), {}),
    ):
        with pytest.raises(ValueError, match="reads its outputs elsewhere"):
            KronLoraLaplace(model, "classification", mask_token_id=MASK, **options)
    with pytest.raises(ValueError, match="outputs at all of them"):
        KronLoraLaplace(peft_model("llama-lm"), "language_modeling", mask_token_id=MASK)
    with pytest.raises(ValueError, match="give it the `mask_token_id`"):
        KronLoraLaplace(LogitsModel(masked_model(), TARGETS), "classification", mask_token_id=MASK)
