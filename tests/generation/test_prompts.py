"""What stands before or beside a text: prompt tuning's own tokens, images, positions."""

import logging

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

from laplace_lora import DiagLoraLaplace
from laplace_lora.generation import generate, reading, score
from laplace_lora.predictive.sample_set import SampleSet
from support.batches import token_batch
from support.generation import K, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import base_model, excite
from support.sampled import explicit_samples

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")

KINDS = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig}


def prompted(kind, name="llama-lm"):
    config = KINDS[kind](task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = excite(get_peft_model(base_model(name), config)).double()
    la = DiagLoraLaplace(model, "language_modeling", prior_precision=3.0, uncovered="diag")
    la.fit(text_loader())
    return la


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama-lm", "gpt2-lm"])
def test_samples_are_those_of_explicit_jacobians(kind, name):
    la, batch = prompted(kind, name), text_batch()
    means, moved = explicit_samples(la, batch, SampleSet(la.fitted, 4, seeded()).directions)
    ours = score(la, batch, K, n_samples=4, generator=seeded())
    for n, mask in enumerate(batch["attention_mask"].bool()):
        labels = batch["labels"][n, mask][1:]
        scored = labels != -100
        for s, delta in enumerate((*moved[n], *-moved[n])):
            f = (means[n] + delta)[-len(mask[mask]) :][:-1][scored].log_softmax(-1)
            expected = f.gather(1, labels[scored].unsqueeze(1)).sum()
            torch.testing.assert_close(ours.log_probabilities[s, n], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_generation_reads_the_prompt_once_and_scores_alike(kind, monkeypatch, caplog):
    la = prompted(kind)
    model = la.logits_model.model
    ids = token_batch((4, 4))["input_ids"]
    with caplog.at_level(logging.INFO, logger=reading.__name__):
        written = generate(la, ids, 4, K, generator=seeded(), eos_token_id=[])
    assert ("puts a prompt before a text" in caplog.text) == (kind == "prompt")
    texts = torch.cat([ids, written.tokens], 1)
    with torch.no_grad():
        own = model.eval()(input_ids=texts).logits[:, -5:-1].log_softmax(-1)
    expected = own.gather(-1, written.tokens.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(written.map_log_prob, expected, atol=1e-5, rtol=1e-5)
    labels = texts.clone()
    labels[:, :4] = -100
    again = {"input_ids": texts, "labels": labels}
    monkeypatch.setattr(reading, "PIECE", 2)
    ours = score(la, again, K, n_samples=16, generator=seeded())
    torch.testing.assert_close(
        ours.log_probabilities, written.log_probabilities, atol=1e-5, rtol=1e-5
    )


def test_prompts_of_several_lengths_are_refused_where_padding_would_count():
    with pytest.raises(ValueError, match="from prompts of one length at a time"):
        generate(prompted("prompt"), token_batch((4, 2)), 2, K)


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_prompts_that_are_more_than_text_are_refused(method):
    la, batch = language_posterior(name="gpt2-lm"), text_batch()
    options = {"max_new_tokens": 2, "top_k": K, "eos_token_id": [], "method": method}
    positions = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    for beside in ({"token_type_ids": batch["input_ids"]}, {"position_ids": positions + 3}):
        with pytest.raises(ValueError, match=f"prompts have .*{next(iter(beside))}"):
            generate(la, {**batch, **beside}, **options)
    alone = generate(la, batch, generator=seeded(), **options)
    same = generate(la, {**batch, "position_ids": positions}, generator=seeded(), **options)
    assert torch.equal(same.log_prob, alone.log_prob)


@pytest.mark.parametrize("method", ["sampled", "exact"])
def test_texts_that_grow_beyond_the_models_positions_are_refused_by_what_to_do(method):
    la = language_posterior(name="gpt2-lm")
    prompts = token_batch((30,))["input_ids"]
    assert generate(la, prompts, 2, K, method=method, eos_token_id=[]).tokens.shape == (1, 2)
    with pytest.raises(ValueError, match=r"33 tokens, .* for 32; .* generated count"):
        generate(la, prompts, 4, K, method=method, eos_token_id=[])
    long = token_batch((34,))["input_ids"]
    with pytest.raises(ValueError, match="positions for 32; truncate"):
        score(la, {"input_ids": long, "labels": long}, K, method=method)
