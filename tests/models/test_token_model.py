"""TokenModel: logits of the scored tokens alone."""

import pytest
from torch.nn import functional as F

from laplace_lora import KronLoraLaplace
from laplace_lora.likelihoods.language_modeling import IGNORED, token_labels
from laplace_lora.models.token_model import TokenModel
from support.language import LENGTHS, text_batch
from support.models import VOCABULARY, peft_model
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
    with pytest.raises(ValueError, match="not a causal language model"):
        KronLoraLaplace(peft_model(name), "language_modeling")
