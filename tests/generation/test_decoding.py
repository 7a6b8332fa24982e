"""Decoding by exact moments: greedy without uncertainty, drawn from the predictive."""

from functools import partial

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, KronLoraLLLaplace, LogitsModel
from laplace_lora.generation import decoding, scoring
from support.batches import token_batch
from support.generation import FIELDS, K, posteriors, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import TARGETS, VOCABULARY, peft_model
from support.references import assert_near

# torch.func, here the reference, has no batching rule for fused attention.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

generate, score = (partial(method, method="exact") for method in (decoding.generate, scoring.score))


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
@pytest.mark.parametrize("link", ["quadrature", "mc", "probit"])
def test_without_uncertainty_decoding_is_greedy_and_knows_nothing_more(name, link):
    la = language_posterior(name=name, prior_precision=1e16)
    prompts = token_batch((4, 2, 5), pad_to=6, side="left")
    del prompts["labels"]
    model = la.model.model.eval()
    longest = model.generate(**prompts, max_new_tokens=5, do_sample=False, pad_token_id=0)
    end = int(longest[0, 8])  # so that the first text ends after three tokens at most
    theirs = model.generate(
        **prompts, max_new_tokens=5, do_sample=False, eos_token_id=end, pad_token_id=0
    )[:, 6:]
    for batch in (prompts, {k: v for k, v in token_batch((4, 2, 5)).items() if k != "labels"}):
        ours = generate(la, batch, 5, 3, link_approx=link, eos_token_id=end)
        assert torch.equal(ours.tokens, theirs)
        after = (theirs == end).cumsum(1) - (theirs == end).int()
        assert torch.equal(ours.mask, after == 0) and not ours.mask[0].all()
    assert float(ours.mutual_information.abs().max()) < 1e-10
    assert_near(ours.probabilities, ours.map_probabilities)
    assert_near(ours.expected_entropy, ours.entropy)


@pytest.mark.parametrize("kind", ["tokens", "answers"])
def test_generated_texts_score_as_they_were_predicted(kind):
    la = posteriors("gpt2-lm")[kind]()
    prompts = token_batch((4, 2, 5), side="right")
    ours = generate(la, prompts, 3, K, generator=seeded())
    assert ours.tokens.shape == (3, 3) and (ours.mutual_information[ours.mask] > 0).all()
    assert torch.equal(
        ours.tokens, ours.candidates.gather(2, ours.probabilities.argmax(-1)[..., None])[..., 0]
    )
    width = prompts["input_ids"].shape[1] + 3
    ids, mask, labels = (torch.full((3, width), fill) for fill in (0, 0, -100))
    for n, length in enumerate((4, 2, 5)):
        ids[n, :length] = prompts["input_ids"][n, :length]
        new = slice(length, length + int(ours.mask[n].sum()))
        ids[n, new] = labels[n, new] = ours.tokens[n, ours.mask[n]]
        mask[n, : new.stop] = 1
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    again = score(la, batch, K, generator=seeded())
    for field in FIELDS:
        assert_near(getattr(again, field), getattr(ours, field), 1e-5)


def test_the_configurations_ending_tokens_end_texts():
    la = language_posterior()
    prompt = token_batch((4,))["input_ids"]
    free = generate(la, prompt, 4, 2, generator=seeded())
    la.logits_model.model.generation_config.eos_token_id = [int(free.tokens[0, 0]), 2]
    ended = generate(la, prompt, 4, 2, generator=seeded())
    assert torch.equal(ended.tokens, free.tokens[:, :1])
    la.logits_model.model.generation_config.eos_token_id = None
    assert generate(la, prompt, 4, 2).tokens.shape == (1, 4)


def test_sampling_draws_from_the_predictive():
    la = language_posterior()
    prompt = token_batch((4,))["input_ids"]
    many = generate(la, prompt.expand(400, -1), 1, 3, do_sample=True, generator=seeded())
    p = many.probabilities[0, 0]
    counts = (many.tokens == many.candidates[0, 0]).sum(0)
    assert counts.sum() == 400
    torch.testing.assert_close(counts / 400, (p / p.sum()).float(), atol=0.08, rtol=0)
    again = generate(la, prompt.expand(400, -1), 1, 3, do_sample=True, generator=seeded())
    assert torch.equal(many.tokens, again.tokens)


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_token_numbers_of_another_dtype_are_the_same_tokens(method):
    la, prompt = language_posterior(), token_batch((4, 4))["input_ids"]
    expected = generate(la, prompt, 3, K, generator=seeded(), method=method)
    found = generate(la, prompt.int(), 3, K, generator=seeded(), method=method)
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.log_prob, expected.log_prob)


def test_the_model_is_left_as_it_was():
    la = language_posterior()
    la.model.train()
    la.model.model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in la.model.modules()]
    score(la, text_batch(), K)
    generate(la, token_batch((4,))["input_ids"], 1, K)
    assert [module.training for module in la.model.modules()] == modes
    assert all(p.grad is None for p in la.model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in la.model.modules())


def test_errors():
    batch, prompt = text_batch(), token_batch((4,))["input_ids"]
    la = language_posterior()
    for top_k in (0, VOCABULARY + 1):
        with pytest.raises(ValueError, match=rf"top_k must lie in 1\.\.{VOCABULARY}"):
            score(la, batch, top_k)
    with pytest.raises(ValueError, match="link_approx"):
        score(la, batch, K, link_approx="bridge")
    with pytest.raises(ValueError, match="n_samples"):
        generate(la, prompt, n_samples=0)
    with pytest.raises(ValueError, match="max_new_tokens"):
        generate(la, prompt, 0)
    with pytest.raises(ValueError, match="batch_size"):
        score(la, batch, K, batch_size=0)
    with pytest.raises(TypeError, match="'labels'"):
        score(la, {"input_ids": prompt}, K)
    with pytest.raises(ValueError, match="no token of the batch is scored"):
        score(la, {**batch, "labels": torch.full_like(batch["labels"], -100)}, K)
    with pytest.raises(ValueError, match="labels must lie in the vocabulary"):
        score(la, {**batch, "labels": batch["labels"] + 90}, K)
    for missing in ({}, prompt[:, :0], prompt[0], [[1, 2]]):
        with pytest.raises(ValueError, match="prompts are missing"):
            generate(la, missing)
    empty = {"input_ids": prompt, "attention_mask": torch.zeros_like(prompt)}
    with pytest.raises(ValueError, match="no real token"):
        generate(la, empty)
    with pytest.raises(AttributeError, match="not fitted"):
        generate(DiagLoraLaplace(peft_model("llama-lm"), "language_modeling"), prompt)
    classifier = KronLoraLaplace(peft_model("llama"), "classification")
    classifier.fit(text_loader(2, token_batch((4, 6, 3))))
    with pytest.raises(ValueError, match="not a causal language model"):
        generate(classifier, prompt)
    last = KronLoraLLLaplace(LogitsModel(peft_model("llama-lm"), TARGETS), "classification")
    last.fit(text_loader(2, token_batch((4, 6, 3))))
    with pytest.raises(ValueError, match="last-layer posterior"):
        score(last, batch)
    assert decoding.TOP_K < VOCABULARY
