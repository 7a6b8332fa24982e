"""Tangents are Jacobians times perturbations, whatever the padding or cache."""

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
)
from laplace_lora.generation import generate, reading, score
from laplace_lora.models.tangents import tangent_cache
from laplace_lora.predictive.sample_set import SampleSet
from support.batches import token_batch
from support.generation import FIELDS, K, seeded
from support.language import text_batch
from support.models import VOCABULARY
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
