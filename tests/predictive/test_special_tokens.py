"""A tokenizer that writes behind texts is refused where a decoder's answers follow them."""

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.integrations.estimator import LaplaceClassifier
from laplace_lora.integrations.pipeline import LaplacePipeline
from support.batches import loader
from support.models import TARGETS, peft_model
from support.posteriors import posterior
from support.texts import special_tokenizer

REFUSED = r"ends every text with 'g'.*no answer.*add_eos_token=False"
ENDED = special_tokenizer("h $A g")
TEXTS = ["a b", "c"]


def answers(name):
    model = peft_model(name).float()
    la = KronLoraLaplace(model, "classification", target_ids=TARGETS)
    la.fit(loader())
    return la


def test_answers_of_a_decoder_follow_open_texts():
    la = answers("llama-lm")
    for call in (
        lambda: la.predict(TEXTS, ENDED),
        lambda: la.acquire(TEXTS, 1, tokenizer=ENDED),
        lambda: LaplaceClassifier(la, ENDED).fit(TEXTS, [0, 1]),
        lambda: LaplacePipeline(la, ENDED),
    ):
        with pytest.raises(ValueError, match=REFUSED):
            call()
    assert la.predict(TEXTS, special_tokenizer()).probs.shape == (2, len(TARGETS))


@pytest.mark.parametrize("name", ["bert", "llama", "t5-lm"])
def test_heads_and_encoders_read_ends(name):
    la = answers(name) if name.endswith("-lm") else posterior(name=name)
    expected = torch.cat([la(dict(ENDED([text], return_tensors="pt"))) for text in TEXTS])
    assert torch.allclose(la.predict(TEXTS, ENDED).probs, expected)
