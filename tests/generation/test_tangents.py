"""Tangents are Jacobians times perturbations, whatever the padding or cache."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, jacrev
from transformers import (
    MambaConfig,
    MambaForCausalLM,
)

from laplace_lora import (
    DiagLoraLaplace,
)
from laplace_lora.generation import generate, reading, score
from laplace_lora.models import tangent_cache
from laplace_lora.predictive.sample_set import SampleSet
from support.batches import token_batch
from support.generation import FIELDS, K, seeded
from support.language import text_batch, text_loader
from support.models import PAD, VOCABULARY, excite
from support.sampled import NAMES, explicit_samples, fitted, language_model, read_all


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("piece", [2, 128])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tangents_are_jacobians_times_directions(name, piece, side, in_double, monkeypatch):
    la = fitted(name)
    batch = token_batch((4, 7, 3), pad_to=8, side=side)
    directions = SampleSet(la.fitted, 4, seeded()).directions
    means, moved = explicit_samples(la, batch, directions)
    monkeypatch.setattr(reading, "PIECE", piece)
    ours, slopes = read_all(la, batch)
    assert slopes.shape == (2, 3, 8, VOCABULARY)
    for n, mask in enumerate(batch["attention_mask"].bool()):
        torch.testing.assert_close(ours[n, mask], means[n], atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(slopes[:, n, mask], moved[n], atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("room", [1, 64])
def test_cached_equals_uncached(name, room, in_double, monkeypatch):
    monkeypatch.setattr(tangent_cache, "LEAST_ROOM", room)
    la = fitted(name)
    prompts = token_batch((4, 7, 3), side="right")
    free = generate(la, prompts, 5, K, generator=seeded())
    end = int(free.tokens[0, 1])
    cached = generate(la, prompts, 5, K, generator=seeded(), eos_token_id=end)
    assert not cached.mask.all()
    monkeypatch.setattr(reading, "carries_tangents", lambda cache: False)
    uncached = generate(la, prompts, 5, K, generator=seeded(), eos_token_id=end)
    assert torch.equal(cached.tokens, uncached.tokens)
    for field in (*FIELDS, "tail_probability", "log_probabilities"):
        one, other = getattr(cached, field), getattr(uncached, field)
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8)


def test_padding_batches_and_pieces_change_nothing(monkeypatch):
    la = fitted()
    reference = score(la, text_batch(), K, generator=seeded())
    for batch, size in ((text_batch(pad_to=9), 1), (text_batch(pad_to=8, side="left"), 2)):
        monkeypatch.setattr(reading, "ROOM", 1)
        other = score(la, batch, K, generator=seeded(), batch_size=size)
        for field in (*FIELDS, "tail_probability", "log_probabilities"):
            one, theirs = getattr(other, field), getattr(reference, field)
            torch.testing.assert_close(one, theirs, atol=1e-6, rtol=1e-6)


def test_a_model_without_a_plain_attention_cache_reads_every_text_anew(caplog, in_double):
    torch.manual_seed(0)
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=PAD
    )
    adapter = LoraConfig(r=2, target_modules=["in_proj", "x_proj"])
    model = excite(get_peft_model(MambaForCausalLM(config), adapter)).double()
    la = DiagLoraLaplace(model, "language_modeling")
    la.fit(text_loader(2, text_batch((5, 5, 5))))
    batch = token_batch((5, 5))
    directions = SampleSet(la.fitted, 4, seeded()).directions
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def f(w):
        return functional_call(model.eval(), w, (), {"input_ids": batch["input_ids"]}).logits

    J = torch.cat([J.flatten(3) for J in jacrev(f)(weights).values()], -1)
    with caplog.at_level(logging.INFO, logger=reading.__name__):
        ours, slopes = read_all(la, batch)
    assert "no plain attention cache" in caplog.text
    torch.testing.assert_close(ours, f(weights), atol=1e-8, rtol=1e-8)
    expected = torch.einsum("ntvp,kp->kntv", J, directions)
    torch.testing.assert_close(slopes, expected, atol=1e-8, rtol=1e-8)
    written = generate(la, batch, 3, K, generator=seeded())
    ids = torch.cat([batch["input_ids"], written.tokens], 1)
    labels = ids.clone()
    labels[:, :5] = -100
    again = score(la, {"input_ids": ids, "labels": labels}, K, n_samples=16, generator=seeded())
    torch.testing.assert_close(again.log_probabilities, written.log_probabilities)


@pytest.mark.parametrize(
    "kwargs",
    [{"use_dora": True}, {"target_modules": "all-linear"}],
    ids=["dora", "all-linear"],
)
def test_other_adapters(kwargs, in_double):
    model = language_model("qwen3", **kwargs)
    la = fitted(model=model, cls=DiagLoraLaplace, uncovered="diag")
    batch = token_batch((4, 6))
    means, moved = explicit_samples(la, batch, SampleSet(la.fitted, 4, seeded()).directions)
    ours, slopes = read_all(la, batch)
    torch.testing.assert_close(slopes[:, 0, :4], moved[0], atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(ours[1], means[1], atol=1e-8, rtol=1e-8)
