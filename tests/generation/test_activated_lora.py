"""Activated LoRA runs from certain tokens of a text on, however the text is read."""

import torch

from laplace_lora import DiagLoraLaplace
from laplace_lora.generation import generate, score
from support.batches import token_batch
from support.language import text_batch, text_loader
from support.models import excite, peft_model

START = 5


def started(batch):
    ids = batch["input_ids"].clone()
    ids[:, 1] = START
    return {**batch, "input_ids": ids}


def test_it_stays_on_in_later_tokens_and_later_pieces(monkeypatch):
    model = peft_model("llama-lm", task_type="CAUSAL_LM", alora_invocation_tokens=[START])
    model = excite(model, scale=0.6).eval()
    la = DiagLoraLaplace(model, "language_modeling", uncovered="diag", prior_precision=20.0)
    la.fit(text_loader(2, started(text_batch((5, 5, 5)))))
    prompts = started(token_batch((5, 5)))
    del prompts["labels"]
    written = generate(la, prompts, 3, 4, n_samples=4, eos_token_id=[])
    ids = torch.cat([prompts["input_ids"], written.tokens], 1)
    assert not (written.tokens == START).any(), "a second start says something else"
    expected = model(input_ids=ids).logits[:, 4:-1].log_softmax(-1)
    expected = expected.gather(-1, written.tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(written.map_log_prob, expected)
    with model.disable_adapter():
        without = model(input_ids=ids).logits[:, 4:-1].log_softmax(-1)
    without = without.gather(-1, written.tokens.unsqueeze(-1)).squeeze(-1)
    assert ((without - expected).abs() > 1e-3).all(), "the adapter does nothing"
    monkeypatch.setattr("laplace_lora.generation.reading.PIECE", 3)
    labels = ids.clone()
    labels[:, :5] = -100
    found = score(la, {"input_ids": ids, "labels": labels}, 4, n_samples=4)
    torch.testing.assert_close(found.map_log_prob, expected)
