"""What is a linear head in half precision, and what only looks like one there."""

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import LoraConfig, get_peft_model
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from laplace_lora import FullLoraLLLaplace, KronLoraLLLaplace
from support.batches import loader, token_batch
from support.models import TARGETS, TINY, excite, peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 6), seed=9)
GEMMA = {**TINY, "query_pre_attn_scalar": 8, "num_labels": 3}  # its logits are capped at 30
DTYPES = [torch.float32, torch.bfloat16, torch.float16, "autocast"]


def capped():
    return Gemma2ForCausalLM(Gemma2Config(**GEMMA))


def cohere(scale):
    return CohereForCausalLM(CohereConfig(**TINY, logit_scale=scale))


def llama(**kwargs):
    return LlamaForCausalLM(LlamaConfig(**{**TINY, **kwargs}))


def adapted(base):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return excite(get_peft_model(base, lora))


def computing_in(model, dtype):
    """Return a model in a dtype, or as accelerate leaves it that has trained it in bfloat16."""
    if dtype != "autocast":
        return model.to(dtype)
    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = convert_outputs_to_fp32(forward)
    return model


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [capped, lambda: cohere(0.98)], ids=["capped", "scaled"])
def test_what_comes_after_the_head_is_refused_however_little_it_changes(make, dtype):
    """A cap moves small logits by less than half precision rounds them."""
    torch.manual_seed(0)
    model = adapted(make())
    model.get_base_model().get_output_embeddings().weight.data.mul_(20)
    model = computing_in(model, dtype)
    with pytest.raises(RuntimeError, match=r"not a linear map .* `final_logit_softcapping`"):
        FullLoraLLLaplace(model, "classification", target_ids=TARGETS).fit(loader())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_adapter_on_the_head_is_refused(dtype):
    model = peft_model("llama-lm", dtype=torch.float32, target_modules=["q_proj", "lm_head"])
    model = computing_in(model, dtype)
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(model, "classification", target_ids=TARGETS).fit(loader())


HEADS = {
    "a classifier whose language model is capped": (
        lambda: Gemma2ForSequenceClassification(Gemma2Config(**GEMMA)),
        None,
    ),
    "a scale of 1": (lambda: cohere(1.0), TARGETS),
    "tied": (lambda: llama(tie_word_embeddings=True), TARGETS),
    "a large vocabulary": (lambda: llama(vocab_size=4000), [7, 3999]),
}


@pytest.mark.parametrize("scale", [1, 50])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_linear_heads_are_taken(head, dtype, scale):
    make, targets = HEADS[head]
    torch.manual_seed(0)
    model = adapted(make())
    base = model.get_base_model()
    (base.score if targets is None else base.get_output_embeddings()).weight.data.mul_(scale)
    model = computing_in(model, dtype)
    la = FullLoraLLLaplace(model, "classification", target_ids=targets)
    la.fit(loader(labels=2 if targets == [7, 3999] else 3))
    with torch.no_grad():
        own = la.logits_model.eval()(BATCH)
    assert_near(la.predict(BATCH).mean, own, 0.02)
