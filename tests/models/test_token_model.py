"""TokenModel: logits of the scored tokens alone."""

import pytest
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import (
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from laplace_lora import KronLoraLaplace
from laplace_lora.generation import score
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.models.token_model import TokenModel
from support.batches import loader
from support.language import LENGTHS, text_batch, text_loader
from support.models import TARGETS, VOCABULARY, bert_config, excite, peft_model
from support.references import assert_near

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_logits_are_those_that_transformers_scores(name):
    model = peft_model(name).eval()
    batch = text_batch(pad_to=8)
    tokens = TokenModel(model)
    labels = token_labels(batch, batch["labels"])
    logits = tokens(batch)
    assert logits.shape == ((labels != IGNORED).sum(), VOCABULARY)
    assert (labels != IGNORED).sum(1).tolist() == [3, 3, 1]
    loss = F.cross_entropy(logits, labels[labels != IGNORED])
    assert_near(loss, model(**batch).loss.to(loss))
    last = tokens.next_logits(batch)
    full = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    assert_near(last, full[range(3), [length - 1 for length in LENGTHS]])


def test_the_head_runs_at_scored_tokens_only():
    model = peft_model("llama-lm")
    seen = []
    head = model.get_base_model().lm_head
    handle = head.register_forward_hook(lambda m, args, out: seen.append(tuple(out.shape)))
    TokenModel(model)(text_batch())
    handle.remove()
    assert seen == [(7, 1, VOCABULARY)]
    assert not head._forward_pre_hooks


@pytest.mark.parametrize("name", ["bert", "llama", "t5-lm"])
def test_only_causal_language_models_predict_tokens(name):
    advice = "not a causal language model.*AutoModelForImageTextToText; encoder-decoders answer by"
    with pytest.raises(ValueError, match=advice):
        KronLoraLaplace(peft_model(name), "language_modeling")


def language_model(kind, config, target):
    base = kind(config)
    lora = LoraConfig(r=2, target_modules=target, task_type="CAUSAL_LM")
    return excite(get_peft_model(base, lora)).double()


def test_an_encoder_that_sees_what_it_predicts_is_refused():
    encoder = language_model(BertLMHeadModel, bert_config(), ["query", "value"])
    with pytest.raises(ValueError, match=r"in both directions.* a decoder \(is_decoder=True"):
        KronLoraLaplace(encoder, "language_modeling").fit(text_loader())
    la = KronLoraLaplace(encoder, "classification", target_ids=TARGETS)
    la.fit(loader())
    with pytest.raises(ValueError, match="in both directions"):
        score(la, text_batch())
    decoder = language_model(BertLMHeadModel, bert_config(is_decoder=True), ["query", "value"])
    KronLoraLaplace(decoder, "language_modeling").fit(text_loader())


@pytest.mark.parametrize("causal", [False, True])
def test_a_model_whose_configuration_says_nothing_is_tried(causal):
    sizes = {"vocab_size": VOCABULARY, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0}
    model = language_model(XLMWithLMHeadModel, XLMConfig(**sizes, causal=causal), ["q_lin"])
    la = KronLoraLaplace(model, "language_modeling")
    if causal:
        la.fit(text_loader())
    else:
        with pytest.raises(ValueError, match="in both directions"):
            la.fit(text_loader())


def test_a_decoder_whose_configuration_does_not_say_so_is_none_of_these():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)
    model = language_model(GPTNeoXForCausalLM, config, ["query_key_value"])
    la = KronLoraLaplace(model, "language_modeling")
    la.fit(text_loader())
    assert score(la, text_batch()).mask.any()
