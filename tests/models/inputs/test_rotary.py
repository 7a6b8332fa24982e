"""Rotary angles and attention that depend on the lengths in a batch, against each text alone."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Phi3ForSequenceClassification,
)

from laplace_lora import KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.generation import generate, reading, score
from laplace_lora.predictive.sample_set import SampleSet
from support.batches import token_batch
from support.generation import FIELDS, K, seeded
from support.language import text_batch, text_loader
from support.models import TARGETS, TINY, VOCABULARY, excite, llama_config
from support.references import assert_near, looped_jacobians
from support.sampled import read_all

LIMIT = 6
SIZES = {**TINY, "initializer_range": 0.3}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [3.0] * 4,
    "original_max_position_embeddings": LIMIT,
}


def adapted(base, targets):
    return excite(get_peft_model(base, LoraConfig(r=2, target_modules=targets))).double().eval()


def phi(kind=Phi3ForCausalLM, **kwargs):
    torch.manual_seed(0)
    config = Phi3Config(
        **SIZES, rope_parameters=LONGROPE, original_max_position_embeddings=LIMIT, **kwargs
    )
    return adapted(kind(config), ["qkv_proj", "down_proj"])


def dynamic_llama():
    torch.manual_seed(0)
    parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = llama_config(rope_parameters=parameters)
    config.max_position_embeddings = LIMIT
    return adapted(LlamaForCausalLM(config), ["q_proj"])


def llama4(floor_scale):
    torch.manual_seed(0)
    config = Llama4TextConfig(
        **SIZES,
        intermediate_size_mlp=24,
        moe_layers=[],
        no_rope_layers=[1, 0],
        floor_scale=floor_scale,
    )
    return adapted(Llama4ForCausalLM(config), ["q_proj", "v_proj"])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("lengths", [(3, 5, 6), (9, 7, 8)])
def test_texts_on_one_side_of_the_limit_are_read_as_each_alone(lengths, side):
    model, batch = phi(), token_batch(lengths, side=side)
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    jacobians, logits = LoraGGN(wrapped, "classification").jacobians(batch)
    for n, mask in enumerate(batch["attention_mask"].bool()):
        text = {"input_ids": batch["input_ids"][n : n + 1, mask], "labels": batch["labels"][:1]}
        assert_near(logits[n], model(input_ids=text["input_ids"]).logits[0, -1, TARGETS].detach())
        assert_near(jacobians[n : n + 1], looped_jacobians(wrapped, text), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_text_that_a_longer_one_changes_is_refused(side):
    with pytest.raises(ValueError, match="a text of 5 tokens stands in a batch of 9, and beyond 6"):
        LogitsModel(phi(), target_ids=TARGETS)(token_batch((9, 5), side=side))
    classifier = LogitsModel(phi(Phi3ForSequenceClassification, num_labels=3))
    with pytest.raises(ValueError, match="batches of their own"):
        classifier(token_batch((9, 5), side=side))


def test_padding_beyond_the_limit_is_refused():
    with pytest.raises(ValueError, match="a text of 5 tokens stands in a batch of 8"):
        LogitsModel(phi(), target_ids=TARGETS)(token_batch((5, 6), pad_to=8))


def test_angles_that_depend_on_what_was_read_before_are_refused():
    wrapped = LogitsModel(dynamic_llama(), target_ids=TARGETS)
    assert wrapped(token_batch((6, 4))).isfinite().all()
    with pytest.raises(ValueError, match="truncate the texts to 6 tokens"):
        wrapped(token_batch((7, 7)))


def test_queries_scaled_by_positions_that_count_padding_are_refused():
    wrapped = LogitsModel(llama4(floor_scale=4), target_ids=TARGETS).eval()
    right = wrapped(token_batch((9, 5)))
    for n, length in enumerate((9, 5)):
        ids = token_batch((9, 5))["input_ids"][n : n + 1, :length]
        assert_near(right[n], wrapped.model(input_ids=ids).logits[0, -1, TARGETS])
    with pytest.raises(ValueError, match="padding before a text, and from 4 on"):
        wrapped(token_batch((9, 5), side="left"))
    below = LogitsModel(llama4(floor_scale=12), target_ids=TARGETS).eval()
    assert_near(below(token_batch((9, 5), side="left")), below(token_batch((9, 5))))


def test_positions_are_tried_on_the_text_with_the_most_padding():
    model = llama4(floor_scale=4)
    model.get_base_model().config.attn_temperature_tuning = False  # its layers do it all the same
    batch = token_batch((9, 3), side="left", pad_to=10)  # one token of padding changes nothing
    with pytest.raises(ValueError, match="padding before a text changes the model's logits"):
        LogitsModel(model, target_ids=TARGETS).eval()(batch)


def language_posterior(lengths):
    la = KronLoraLaplace(phi(), "language_modeling", prior_precision=20.0)
    la.fit(text_loader(3, text_batch(lengths)))
    return la


def check_last_token(la, ids, logits, slopes):
    """Compare a token's logits and their tangents, in a random mixture, with autograd's."""
    model = la.logits_model.model.eval()
    own = model(input_ids=ids, use_cache=False).logits[0, -1]
    mixture = torch.randn(VOCABULARY, generator=seeded()).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.autograd.grad(own @ mixture, parameters)
    directions = SampleSet(la.fitted, 4, seeded()).directions
    assert_near(logits, own.detach())
    assert_near(slopes @ mixture, directions @ torch.cat([g.flatten() for g in gradient]), 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_short_texts_are_sampled_with_a_model_that_writes_its_angles(side):
    la = language_posterior((4, 6, 3))
    batch = text_batch((4, 6, 3), side=side)
    logits, slopes = read_all(la, batch)
    for n, mask in enumerate(batch["attention_mask"].bool()):
        last = int(mask.nonzero()[-1])
        check_last_token(la, batch["input_ids"][n][mask][None], logits[n, last], slopes[:, n, last])


@pytest.mark.parametrize("piece", [128, 4])
def test_each_token_is_predicted_from_those_before_it_across_the_limit(piece, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", piece)
    la = language_posterior((9, 9, 9))
    batch = text_batch((9, 9, 9))
    logits, slopes = read_all(la, batch)
    for end in range(1, 10):
        ids = batch["input_ids"][:1, :end]
        check_last_token(la, ids, logits[0, end - 1], slopes[:, 0, end - 1])


def test_texts_are_written_across_the_limit_as_they_are_scored():
    la = language_posterior((9, 9, 9))
    prompts = token_batch((4, 4))
    written = generate(la, prompts, 5, K, generator=seeded(), eos_token_id=[])
    ids = torch.cat([prompts["input_ids"], written.tokens], 1)
    labels = ids.clone()
    labels[:, :4] = -100
    again = score(la, {"input_ids": ids, "labels": labels}, K, n_samples=16, generator=seeded())
    for field in (*FIELDS, "log_probabilities"):
        torch.testing.assert_close(getattr(again, field), getattr(written, field))
    labels[:, :7] = -100  # exact moments are of tokens on one side of it
    exact = score(la, {"input_ids": ids, "labels": labels}, K, method="exact")
    assert_near(exact.map_log_prob, written.map_log_prob[:, 3:])


def test_jacobians_that_carry_gradients_are_those_of_each_text():
    model = phi()
    model.get_base_model().set_attn_implementation("eager")
    wrapped = LogitsModel(model, target_ids=TARGETS).eval()
    batch = token_batch((3, 5))
    backend = LoraGGN(wrapped, "classification")
    jacobians, _ = backend.jacobians(batch, enable_backprop=True)
    assert_near(jacobians.detach(), looped_jacobians(wrapped, batch), 1e-5)


def test_exact_moments_of_texts_beyond_the_limit_and_before_it_are_refused():
    la = KronLoraLaplace(phi(), "language_modeling")
    la.fit(text_loader(2, text_batch((5, 5, 5))))
    long = text_batch((9, 9), (1, 3))
    with pytest.raises(ValueError, match=r"beyond 6 .*Use method='sampled'"):
        score(la, long, K, method="exact")
    within = text_batch((6, 6), (1, 3))
    assert score(la, within, K, method="exact").log_prob_variance.isfinite().all()
    beyond = {**long, "labels": long["labels"].clone()}
    beyond["labels"][:, :7] = -100  # read after seven tokens and more
    assert score(la, beyond, K, method="exact").log_prob_variance.isfinite().all()
    prompts = {"input_ids": long["input_ids"][:, :4]}
    with pytest.raises(ValueError, match=r"beyond 6 .*Use method='sampled'"):
        generate(la, prompts, 4, K, method="exact")
    generate(la, prompts, 2, K, method="exact", eos_token_id=[])


def test_what_was_read_before_changes_no_sample_and_no_jacobian():
    """A longer text's angles are written into the model, where those of short ones were."""
    model = dynamic_llama()
    la = KronLoraLaplace(model, "language_modeling", prior_precision=20.0)
    la.fit(text_loader(3, text_batch((4, 5, 4))))
    texts, classifier = text_batch((4, 5, 3)), LogitsModel(model, target_ids=TARGETS).eval()
    batch = token_batch((4, 5, 3))
    backend = LoraGGN(classifier, "classification")
    expected = score(la, texts, K, n_samples=16, generator=seeded())
    logits, jacobians = classifier(batch), backend.jacobians(batch, enable_backprop=True)[0]
    longer = torch.arange(9)[None] % VOCABULARY
    for _ in range(2):
        model(input_ids=longer)
        found = score(la, texts, K, n_samples=16, generator=seeded())
        assert_near(found.log_prob, expected.log_prob)
        model(input_ids=longer)
        assert_near(backend.jacobians(batch, enable_backprop=True)[0], jacobians)
        assert_near(classifier(batch), logits)
