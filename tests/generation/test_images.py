"""Texts whose images are in one tensor, or not one of each: they are read together, and whole."""

from itertools import combinations

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from laplace_lora.data.distributed import ALONE
from laplace_lora.generation import generate, reading, score
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.tuning.texts import training_texts
from support.generation import K, seeded
from support.language import EXACT
from support.sweeps import rest_slow
from support.vision import VISION, image_text_model, image_texts, question, vision_model

PROMPT = 19  # tokens, and three more


def texts():
    found = [question(answer) for answer in range(4)]
    for text in found:
        text["labels"] = text["input_ids"].clone()
        text["labels"][:, :PROMPT] = IGNORED
    return found


def joined(found):
    return {key: torch.cat([text[key] for text in found]) for key in found[0]}


def model(name="qwen2_vl"):
    kind, config, vision = VISION[name]
    return vision_model(kind, config, **vision)


def posterior(batches, name="qwen2_vl", **kwargs):
    la = KronLoraLaplace(model(name), "language_modeling", **kwargs)
    la.fit(DataLoader(batches, batch_size=None))
    return la


@torch.no_grad()
def losses(name="qwen2_vl"):
    own, scored = model(name).eval(), texts()
    logits = [own(**text).logits[0, PROMPT - 1 : -1].log_softmax(-1) for text in scored]
    pairs = zip(logits, scored, strict=True)
    return [-float(f.gather(1, t["labels"][0, PROMPT:, None]).sum()) for f, t in pairs]


@pytest.mark.parametrize("name", rest_slow(VISION, 0))
def test_a_fit_on_batches_is_that_on_texts_alone(name):
    together = posterior([joined(texts())], name, **EXACT)
    alone = posterior(texts(), name, **EXACT)
    assert together.loss == pytest.approx(sum(losses(name)))
    one, other = together.log_marginal_likelihood(), alone.log_marginal_likelihood()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", VISION)
@pytest.mark.parametrize("piece", [7, 128])
def test_scores_are_those_of_texts_alone(name, piece, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", piece)
    la = posterior([joined(texts())], name)
    scored = score(la, joined(texts()), K, generator=seeded())
    found = (-scored.sequence_map_log_prob).tolist()
    assert found == pytest.approx(losses(name), rel=1e-5)
    alone = score(la, texts()[2], K, generator=seeded())
    torch.testing.assert_close(alone.log_prob[0], scored.log_prob[2], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_some_of_the_texts_alone_are_refused(method):
    la = posterior([joined(texts())])
    with pytest.raises(ValueError, match="cannot be read without the others"):
        score(la, joined(texts()), K, method=method, batch_size=2)
    with pytest.raises(ValueError, match=r"the prompts have .*pixel_values"):
        generate(la, joined(texts()), 2, K, method=method)


def test_tuning_reads_some_of_the_texts_among_the_others(monkeypatch):
    monkeypatch.setattr(training_texts, "TOKENS", 60)  # two of them
    la = posterior([joined(texts())])
    la.optimize_prior_precision()
    means = [sum(pair) / 6 for pair in combinations(losses(), 2)]
    assert min(abs(la.tuning.widest.nll_map - mean) for mean in means) < 1e-5


def answered(texts):
    ids = texts["input_ids"]
    return {**texts, "labels": ids.masked_fill((ids < 7) | (ids > 8), IGNORED)}


@torch.no_grad()
def losses_of(singles):
    own, found = image_text_model(), []
    for text in map(answered, singles):
        log_p = own(**{k: v for k, v in text.items() if k != "labels"}).logits[0].log_softmax(-1)
        at = (text["labels"][0] != IGNORED).nonzero().flatten()
        found.append(-float(log_p[at - 1, text["labels"][0, at]].sum()))
    return found


def test_as_many_images_as_texts_that_are_not_one_of_each_are_not_divided(monkeypatch):
    """Texts 0 and 2 of [2, 1, 0, 1] have as many images as rows, one of them the other's."""
    first, (batch, singles) = image_texts((1, 1, 1, 1))[0], image_texts((2, 1, 0, 1), seed=1)
    la = KronLoraLaplace(image_text_model(), "language_modeling")
    la.fit(DataLoader([answered(first), answered(batch)], batch_size=None))
    found = -score(la, answered(batch), K, generator=seeded()).sequence_map_log_prob
    assert found.tolist() == pytest.approx(losses_of(singles), rel=1e-5)
    for options in ({"batch_size": 2}, {"batch_size": 1}, {"method": "exact"}):
        with pytest.raises(ValueError, match="cannot be read without the others"):
            score(la, answered(batch), K, **options)
    la.estimate_memory(answered(batch))
    monkeypatch.setattr(training_texts, "TEXTS", 2)
    kept = training_texts.some_texts(la.fitted, [answered(batch)])
    assert [len(part["input_ids"]) for part in kept] == [4]
    scored = (kept[0]["labels"] != IGNORED).any(1)
    (nll,) = {training_texts.text_losses(la.fitted, kept, torch.ones(1), ALONE).nll_map}
    expected = sum(loss for loss, counts in zip(losses_of(singles), scored, strict=True) if counts)
    assert nll == pytest.approx(expected / int((kept[0]["labels"] != IGNORED).sum()), rel=1e-5)
