"""Generation from samples honours the arguments of transformers' `generate`, and stops in doubt."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

from laplace_lora.generation import generate, score
from laplace_lora.generation.selection import Selection
from support.batches import token_batch
from support.generation import K, seeded
from support.language import language_posterior, text_batch
from support.models import VOCABULARY

METHODS = ["sampled", "exact"]


@pytest.fixture
def certain():
    """A posterior so narrow that the predictive is the MAP's."""
    return language_posterior(prior_precision=1e16)


def prompts(lengths=(4, 2, 5)):
    batch = token_batch(lengths, side="left")
    del batch["labels"]
    return batch


def theirs(la, batch, **kwargs):
    model = la.logits_model.model.eval()
    width = batch["input_ids"].shape[1]
    return model.generate(**batch, max_new_tokens=6, pad_token_id=0, **kwargs)[:, width:]


@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_without_uncertainty_generation_is_greedy(name):
    la = language_posterior(name=name, prior_precision=1e16)
    batch = prompts()
    expected = theirs(la, batch, do_sample=False)
    end = int(expected[0, 2])
    expected = theirs(la, batch, do_sample=False, eos_token_id=end)
    ours = generate(la, batch, 6, 3, eos_token_id=end)
    assert torch.equal(ours.tokens, expected) and not ours.mask.all()
    assert float(ours.mutual_information.abs().max()) < 1e-10
    assert not ours.stopped.any()


@pytest.mark.parametrize("method", METHODS)
def test_a_repetition_penalty_is_transformers(certain, method):
    batch = prompts((5, 5))
    expected = theirs(certain, batch, do_sample=False, repetition_penalty=3.0)
    assert not torch.equal(expected, theirs(certain, batch, do_sample=False))
    k = VOCABULARY if method == "exact" else 1
    ours = generate(certain, batch, 6, k, repetition_penalty=3.0, method=method)
    assert torch.equal(ours.tokens, expected)


def test_padding_is_no_repetition():
    rule = Selection(repetition_penalty=2.0)
    scores = torch.tensor([[5.0, 4.0, -1.0]])
    ids, mask = torch.tensor([[0, 2]]), torch.tensor([[0, 1]])
    assert int(rule(scores, ids, mask)) == 0
    assert int(rule(scores, ids, torch.ones_like(mask))) == 1


def test_a_list_of_processors_is_called(certain):
    batch = prompts((4,))
    end = int(theirs(certain, batch, do_sample=False)[0, 0])
    forbid = MinNewTokensLengthLogitsProcessor(4, 3, end)
    rules = LogitsProcessorList([forbid])
    expected = theirs(certain, batch, do_sample=False, eos_token_id=end, logits_processor=rules)
    assert expected.shape[1] > 1
    ours = generate(certain, batch, 6, 3, eos_token_id=end, logits_processor=rules)
    assert torch.equal(ours.tokens, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_processor_sees_each_text_without_its_padding(certain, method):
    batch, seen = prompts((4, 2)), []

    def penalty(ids, scores):
        seen.append(ids[0].tolist())
        return RepetitionPenaltyLogitsProcessor(30.0)(ids, scores)

    rules = {"eos_token_id": [], "logits_processor": penalty, "method": method}
    both = generate(certain, batch, 6, VOCABULARY, **rules).tokens
    real = [row[row != 0] for row in batch["input_ids"]]
    texts = [[*text.tolist(), *new] for text, new in zip(real, both.tolist(), strict=True)]
    assert seen == [t[: len(r) + i] for i in range(6) for t, r in zip(texts, real, strict=True)]
    alone = generate(certain, real[1].unsqueeze(0), 6, VOCABULARY, **rules)
    assert torch.equal(both[1], alone.tokens[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_forced_token_has_its_own_probability(method):
    """Though it may be none of the candidates."""
    la, batch = language_posterior(), prompts((4, 4))
    forced = la.logits_model.model(**batch).logits[:, -1].argmin(-1)

    def force(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill(1, forced[:1], 0)

    kwargs = {"top_k": 3, "method": method, "n_samples": 16 if method == "sampled" else None}
    found = generate(
        la, batch, 2, logits_processor=force, eos_token_id=[], generator=seeded(), **kwargs
    )
    assert (found.tokens == forced[0]).all()
    ids = torch.cat([batch["input_ids"], found.tokens], 1)
    labels = ids.clone()
    labels[:, :4] = -100
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    expected = score(la, texts, generator=seeded(), **kwargs)
    for name in ("map_log_prob", "log_prob", "tail_probability", "log_prob_variance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    assert (found.candidates == forced[0]).any(-1).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("do_sample", [False, True])
def test_no_token_is_chosen_where_none_can_be(certain, method, do_sample):
    def none(ids, scores):
        return torch.full_like(scores, -torch.inf)

    kwargs = {"method": method, "do_sample": do_sample}
    with pytest.raises(ValueError, match="leaves a text no token to choose"):
        generate(certain, prompts(), 2, 3, logits_processor=none, **kwargs)
    with pytest.raises(FloatingPointError, match=r"rows \[0, 1, 2\]"):
        generate(certain, prompts(), 2, 3, logits_processor=lambda ids, s: s * torch.nan, **kwargs)


def draws(la, **kwargs):
    many = prompts((4,))["input_ids"].expand(400, -1)
    return generate(la, many, 1, generator=seeded(), do_sample=True, n_samples=4, **kwargs)


def test_draws_are_from_the_predictive():
    la = language_posterior()
    many = draws(la, top_k=VOCABULARY)
    p = torch.zeros(VOCABULARY).double().scatter(0, many.candidates[0, 0], many.probabilities[0, 0])
    counts = torch.bincount(many.tokens.flatten(), minlength=VOCABULARY) / 400
    assert float((counts - p).abs().max()) < 0.08
    assert torch.equal(many.tokens, draws(la, top_k=VOCABULARY).tokens)


def test_draws_are_limited_and_sharpened():
    la = language_posterior()
    free = draws(la, top_k=VOCABULARY)
    p, tokens = free.probabilities[0, 0].sort(descending=True)
    tokens = free.candidates[0, 0][tokens]
    assert set(draws(la, top_k=2).tokens.flatten().tolist()) == set(tokens[:2].tolist())
    limit = float(p[:3].sum()) - 1e-6
    nucleus = draws(la, top_k=VOCABULARY, top_p=limit).tokens
    assert set(nucleus.flatten().tolist()) == set(tokens[:3].tolist())
    sharp = draws(la, top_k=VOCABULARY, temperature=0.01).tokens
    assert (sharp == tokens[0]).float().mean() > (free.tokens == tokens[0]).float().mean()
    one = draws(la, top_k=VOCABULARY, top_p=1e-9).tokens
    assert (one == tokens[0]).all()


class Heard(BaseStreamer):
    def __init__(self):
        self.values, self.ended = [], False

    def put(self, value):
        self.values.append(value)

    def end(self):
        self.ended = True


class Words:
    """The least that transformers' streamer wants of a tokenizer."""

    def decode(self, ids, **kwargs):
        return " ".join(str(i) for i in torch.as_tensor(ids).flatten().tolist()) + "\n"


def test_streamers_are_told_of_every_token(capsys):
    la, heard, batch = language_posterior(), Heard(), prompts()
    free = generate(la, batch, 3, K, generator=seeded())
    end = int(free.tokens[0, 0])
    ours = generate(la, batch, 3, K, generator=seeded(), eos_token_id=end, streamer=heard)
    assert torch.equal(heard.values[0], batch["input_ids"]) and heard.ended
    assert torch.equal(torch.stack(heard.values[1:], 1), ours.tokens)
    generate(la, prompts((4,)), 2, K, streamer=TextStreamer(Words(), skip_prompt=True))
    assert len(capsys.readouterr().out.split()) == 2


def test_streamers_are_told_of_padding_as_padding():
    la, heard, batch = language_posterior(), Heard(), prompts((4, 2))
    la.logits_model.model.generation_config.pad_token_id = 7
    generate(la, batch, 1, K, generator=seeded(), streamer=heard)
    expected = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7)
    assert torch.equal(heard.values[0], expected) and bool((expected[1, :2] == 7).all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("on", ["token", "answer"])
def test_uncertain_texts_are_ended_and_marked(method, on):
    la = language_posterior(prior_precision=2.0)
    options = {"top_k": K, "method": method, "eos_token_id": []}
    free = generate(la, prompts(), 6, generator=seeded(), **options)
    doubt = free.mutual_information
    doubt = doubt if on == "token" else doubt.cumsum(1)
    limit = 1.0001 * float(doubt.flatten().median())
    ours = generate(la, prompts(), 6, generator=seeded(), stop_above=limit, stop_on=on, **options)
    passed = doubt > limit
    before = passed.int().cumsum(1) - passed.int() == 0
    assert torch.equal(ours.mask, before[:, : ours.mask.shape[1]])
    assert torch.equal(ours.stopped, passed.any(1)) and ours.stopped.any()
    assert torch.equal(ours.tokens[ours.mask], free.tokens[before])


def test_generated_texts_score_as_they_were_predicted():
    la = language_posterior(prior_precision=3.0)
    batch = prompts((4, 4, 4))
    ours = generate(la, batch, 4, K, eos_token_id=[], n_samples=6, generator=seeded())
    ids = torch.cat([batch["input_ids"], ours.tokens], 1)
    labels = ids.clone()
    labels[:, :4] = -100
    texts = {"input_ids": ids, "labels": labels}
    again = score(la, texts, K, n_samples=6, generator=seeded())
    for field in ("log_probabilities", "entropy", "mutual_information", "probabilities"):
        torch.testing.assert_close(
            getattr(again, field), getattr(ours, field), atol=1e-6, rtol=1e-6
        )


def test_a_near_uniform_model_has_a_near_uniform_entropy():
    la = language_posterior(prior_precision=1e12)
    la.likelihood_temperature = 1e6
    for method in METHODS:
        found = score(la, text_batch(), K, method=method)
        entropy = found.entropy[found.mask]
        full = torch.full_like(entropy, VOCABULARY).log()
        torch.testing.assert_close(entropy, full, atol=1e-5, rtol=0)
        tail = torch.full_like(entropy, 1 - K / VOCABULARY)
        torch.testing.assert_close(found.tail_probability[found.mask], tail, atol=1e-5, rtol=0)


def test_errors():
    la, prompt = language_posterior(), prompts((4,))["input_ids"]
    with pytest.raises(ValueError, match="method must be one of"):
        generate(la, prompt, method="fast")
    for call, argument in ((generate, prompt), (score, text_batch())):
        with pytest.raises(ValueError, match="link_approx integrates"):
            call(la, argument, link_approx="mc")
        with pytest.raises(ValueError, match="n_samples must be a whole number"):
            call(la, argument, n_samples=0)
        with pytest.raises(ValueError, match="top_k must lie"):
            call(la, argument, top_k=0)
        with pytest.raises(TypeError, match=r"by a fitted posterior .*got PeftModel"):
            call(la.logits_model.model, argument)
        for method in METHODS:
            with pytest.raises(TypeError, match=r"must be a torch\.Generator or None, got 0"):
                call(la, argument, method=method, generator=0, top_k=K)
    for end, unknown in ((VOCABULARY, VOCABULARY), (-1, -1), ([2, -3], -3)):
        with pytest.raises(
            ValueError, match=rf"eos_token_id=\[{unknown}\] lies outside .*give \[\]"
        ):
            generate(la, prompt, eos_token_id=end)
    for options, message in (
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"repetition_penalty": -1.0}, "repetition_penalty must be positive"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"top_p": 0.5}, "do_sample=True"),
        ({"stop_above": -1.0}, "stop_above must be zero or more"),
        ({"stop_on": "text"}, "stop_on must be one of"),
        ({"stop_on": "answer"}, "give stop_above"),
    ):
        with pytest.raises(ValueError, match=message):
            generate(la, prompt, **options)
