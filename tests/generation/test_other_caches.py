"""Models whose cache is no plain attention cache read every text anew, or are refused by name."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, jacrev
from transformers import RobertaConfig, RobertaForCausalLM

from laplace_lora import DiagLoraLaplace
from laplace_lora.generation import generate, reading, score
from laplace_lora.predictive.sample_set import SampleSet
from support.architectures import TEXT, architecture
from support.batches import token_batch
from support.generation import FIELDS, K, seeded
from support.language import text_batch, text_loader
from support.models import PAD, VOCABULARY, bert_config, excite
from support.references import assert_near
from support.sampled import read_all

STATES = {
    "mamba_d_state": 4,
    "mamba_d_conv": 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 4,
}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 4,
    "expert_layer_offset": 3,
    "mamba_dt_rank": 4,
}
MADE = {
    "mamba": ({"state_size": 4}, ["in_proj", "x_proj"]),
    "mamba2": ({"state_size": 4, "num_heads": 4, "n_groups": 1, "chunk_size": 4}, ["in_proj"]),
    "jamba": ({**STATES, **JAMBA}, ["x_proj", "q_proj", "v_proj"]),
    "bamba": ({**STATES, "attn_layer_indices": [1]}, ["in_proj", "q_proj", "v_proj"]),
    "falcon_h1": ({**STATES, "mamba_d_ssm": 32}, ["in_proj", "q_proj", "v_proj"]),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, ["in_proj", "q_proj", "v_proj"]),
    "minimax": (
        {"layer_types": ["linear_attention", "full_attention"], "block_size": 4},
        ["q_proj", "v_proj"],
    ),
    "rwkv": ({"attention_hidden_size": 16}, ["key", "value"]),
}


def model_of(name):
    config, targets = MADE[name]
    own = {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": PAD, **config}
    model = architecture("causal", name, own, target=targets)
    model.get_base_model().set_attn_implementation("eager")  # for the reference's sake
    model.get_base_model().config._experts_implementation = "eager"  # others take no float64
    return model


@pytest.mark.parametrize("name", MADE)
def test_tangents_are_jacobians_times_directions(name, caplog, in_double):
    model = model_of(name)
    la = DiagLoraLaplace(model, "language_modeling", prior_precision=20.0)
    la.fit(text_loader(2, text_batch((5, 5, 5))))
    batch = token_batch((5, 5))
    directions = SampleSet(la.fitted, 4, seeded()).directions
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def f(w):
        inputs = {"input_ids": batch["input_ids"], "use_cache": False}
        return functional_call(model.eval(), w, (), inputs).logits

    J = torch.cat([J.flatten(3) for J in jacrev(f)(weights).values()], -1)
    with caplog.at_level(logging.INFO, logger=reading.__name__):
        ours, slopes = read_all(la, batch)
    assert "no plain attention cache: every token reads the text anew" in caplog.text
    torch.testing.assert_close(ours, f(weights), atol=1e-8, rtol=1e-8)
    expected = torch.einsum("ntvp,kp->kntv", J, directions)
    torch.testing.assert_close(slopes, expected, atol=1e-8, rtol=1e-8)
    written = generate(la, batch, 3, K, generator=seeded(), eos_token_id=[])
    ids = torch.cat([batch["input_ids"], written.tokens], 1)
    labels = ids.clone()
    labels[:, :5] = -100
    again = score(la, {"input_ids": ids, "labels": labels}, K, n_samples=16, generator=seeded())
    for field in (*FIELDS, "log_probabilities"):
        torch.testing.assert_close(getattr(again, field), getattr(written, field))


def test_a_model_that_keeps_its_state_in_its_modules_is_refused():
    # Its second forward pass depends on the first.
    config = {**TEXT, "vocab_size": VOCABULARY, "pad_token_id": PAD, "lru_width": 16}
    model = architecture("causal", "recurrent_gemma", config, target=["gate_proj"])
    la = DiagLoraLaplace(model, "language_modeling", prior_precision=20.0)
    la.fit(text_loader(2, text_batch((5, 5, 5))))
    with pytest.raises(ValueError, match="cannot be copied"):
        score(la, text_batch((5, 5, 5)), K)


def test_cached_steps_that_count_padding_are_not_taken(caplog):
    """RoBERTa's decoders count positions by themselves, with a cache otherwise than without."""
    torch.manual_seed(0)
    base = RobertaForCausalLM(bert_config(RobertaConfig, is_decoder=True, initializer_range=0.5))
    model = excite(get_peft_model(base, LoraConfig(r=2, target_modules=["query", "value"])))
    la = DiagLoraLaplace(model.double().eval(), "language_modeling", prior_precision=20.0)
    la.fit(text_loader(2, text_batch((5, 5, 5))))
    prompts = token_batch((3, 7, 7), side="left")
    with caplog.at_level(logging.INFO, logger=reading.__name__):
        written = generate(la, prompts, 4, K, generator=seeded(), eos_token_id=[])
        assert "cached steps count padding" in caplog.text
        caplog.clear()
        generate(la, token_batch((7, 7)), 2, K, generator=seeded(), eos_token_id=[])
        assert not caplog.text
    for n, mask in enumerate(prompts["attention_mask"].bool()):
        prompt = prompts["input_ids"][n][mask]
        ids = torch.cat([prompt, written.tokens[n]])[None]
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        alone = score(la, {"input_ids": ids, "labels": labels}, K, n_samples=16, generator=seeded())
        assert_near(alone.log_prob[0], written.log_prob[n])
    long = text_batch((5, 9), (1, 3), side="left")
    short = text_batch((5, 9), (1, 3))
    scored = [score(la, batch, K, n_samples=4, generator=seeded()) for batch in (long, short)]
    assert_near(scored[0].log_prob, scored[1].log_prob)
