"""Heads whose weights PEFT changes with the embedding: tied ones, and those of trained tokens."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from laplace_lora.generation import score
from support.batches import loader, token_batch
from support.language import text_batch, text_loader
from support.models import TARGETS, VOCABULARY, excite, llama_config
from support.references import assert_near


def tied():
    torch.manual_seed(0)
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    kwargs = {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **kwargs))
    return excite(model).double().eval()


def test_its_tokens_are_the_vocabulary():
    model, batch = tied(), text_batch()
    la = DiagLoraLaplace(model, "language_modeling", uncovered="diag")
    la.fit(text_loader())
    assert la.model.n_outputs == VOCABULARY
    found = score(la, batch, 3)
    assert_near(found.sequence_map_log_prob, la.model.log_likelihood(batch), 1e-5)


def test_its_rows_are_the_answers():
    model, batch = tied(), token_batch((4, 4))
    answers = [*TARGETS[:2], VOCABULARY - 1]
    wrapped = LogitsModel(model, target_ids=answers)
    logits = model(input_ids=batch["input_ids"]).logits[:, -1]
    assert_near(wrapped(batch), logits[:, answers])
    weight, bias = wrapped.head_tensors()
    assert_near(weight, model.get_input_embeddings().weight[answers])
    assert bias is None
    with pytest.raises(ValueError, match=rf"vocabulary, 0\.\.{VOCABULARY - 1}"):
        LogitsModel(model, target_ids=[1, VOCABULARY])


TOKENS = {
    "tied": (True, [3, TARGETS[0]]),
    "apart": (False, {"embed_tokens": [3, TARGETS[0]], "lm_head": [TARGETS[0], 20]}),
}


def with_tokens(kind):
    torch.manual_seed(0)
    is_tied, indices = TOKENS[kind]
    base = LlamaForCausalLM(llama_config(tie_word_embeddings=is_tied))
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=indices)
    return excite(get_peft_model(base, config)).double().eval()


@pytest.mark.parametrize("kind", TOKENS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FullLoraLLLaplace, {}),
        (KronLoraLLLaplace, {}),
        (DiagLoraLLLaplace, {}),
        (FunctionalLoraLLLaplace, {"n_subset": 4}),
    ],
)
def test_last_layers_of_trained_tokens_are_those_of_the_merged_model(kind, cls, options):
    model = with_tokens(kind)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.manual_seed(0)  # which rows the Gaussian process keeps
    la = cls(model, "classification", target_ids=TARGETS, **options)
    la.fit(loader())
    torch.manual_seed(0)
    plain = cls(merged, "classification", target_ids=TARGETS, **options)
    plain.fit(loader())
    batch = token_batch((4, 2, 6), seed=9)
    assert_near(la(batch), plain(batch), 1e-10)
    assert_near(la.log_marginal_likelihood(), plain.log_marginal_likelihood(), 1e-10)


def test_a_trained_token_that_changes_after_the_fit_is_noticed(tmp_path):
    model = with_tokens("tied")
    la = KronLoraLLLaplace(model, "classification", target_ids=TARGETS)
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    batch = token_batch((4, 2, 6), seed=9)
    again = KronLoraLLLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(batch), la(batch))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "trainable_tokens_delta" in n).mul_(1.1)
    with pytest.raises(RuntimeError, match="changed since the posterior was fitted"):
        la(batch)
    with pytest.raises(ValueError, match="weights"):
        KronLoraLLLaplace.from_pretrained(model, tmp_path)
