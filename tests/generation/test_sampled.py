"""Samples of the linearised model: Jacobians times perturbations, whatever the padding or cache."""

import logging
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.func import functional_call, jacrev
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LowRankLoraLaplace,
)
from laplace_lora.generation import generate, reading, score
from laplace_lora.generation.sampled_predictor import SampledPredictor
from laplace_lora.generation.weights import SampleSet
from laplace_lora.models.modes import evaluation_mode
from support.batches import token_batch
from support.generation import FIELDS, K, answers_posterior, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import PAD, VOCABULARY, excite, peft_model

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 32,
    "pad_token_id": PAD,
}
MADE = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, sliding_window=3)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**TINY, sliding_window=3)),
}
NAMES = ["llama-lm", "gpt2-lm", *MADE]


def language_model(name, **kwargs):
    if name not in MADE:
        return peft_model(name, **kwargs)
    torch.manual_seed(0)
    base = MADE[name]()
    kwargs.setdefault("target_modules", ["q_proj", "v_proj", "down_proj"])
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, **kwargs)
    return excite(get_peft_model(base, config)).double()


def fitted(name="llama-lm", cls=KronLoraLaplace, model=None, **kwargs):
    la = cls(model or language_model(name), "language_modeling", **kwargs)
    la.fit(text_loader())
    return la


@pytest.fixture
def in_double(monkeypatch):
    """Let norms and softmaxes, which models compute in float32, be computed in float64."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def explicit_samples(la, batch, directions, monkeypatched=None):
    """Logits of all tokens, and J δ with a Jacobian by reverse mode, one text at a time."""
    model = la.logits_model.model.eval()
    before = model.get_base_model().config._attn_implementation
    model.get_base_model().set_attn_implementation("eager")
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    weights = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    means, moved = [], []
    for n, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][n : n + 1, mask]

        def f(w, ids=ids):
            return functional_call(model, w, (), {"input_ids": ids, "use_cache": False}).logits[0]

        J = jacrev(f)(weights)
        J = torch.cat([J[name].flatten(2) for name in names], -1)
        means.append(f(weights).detach())
        moved.append(torch.einsum("tvp,kp->ktv", J, directions))
    model.get_base_model().set_attn_implementation(before)
    return means, moved


def read_all(la, batch, n_samples=4, cached=True, columns=None):
    predictor = SampledPredictor(la, K, n_samples, seeded())
    width = batch["input_ids"].shape[1]
    with predictor.opened({k: v for k, v in batch.items() if k != "labels"}, cached) as texts:
        parts = list(texts.logits(torch.arange(width)))
    return torch.cat([p[1] for p in parts], 1), torch.cat([p[2] for p in parts], 2)


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
def test_cached_equals_uncached(name, in_double, monkeypatch):
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


@pytest.mark.parametrize(
    "cls, options",
    [
        (KronLoraLaplace, {}),
        (KronLoraLaplace, {"eigenvalue_correction": True}),
        (DiagLoraLaplace, {}),
        (KronLoraLaplace, {"factor_rank": 2, "low_rank_threshold": 4}),
    ],
)
def test_every_posterior_draws_its_samples(cls, options):
    la = fitted(cls=cls, prior_precision=20.0, **options)
    check_moments(la)


@pytest.mark.parametrize("cls", [FullLoraLaplace, LowRankLoraLaplace])
def test_exact_posteriors_draw_their_samples(cls):
    la = answers_posterior("llama-lm", cls)
    la.prior_precision = 20.0
    check_moments(la)


def check_moments(la, n_samples=4096):
    """Sampled moments against exact ones, within four standard errors."""
    la.covariance_scale, la.likelihood_temperature = 1.7, 1.3
    batch = text_batch(pad_to=7)
    exact = score(la, batch, K, method="exact")
    ours = score(la, batch, K, n_samples=n_samples, generator=seeded())
    assert torch.equal(ours.candidates, exact.candidates)
    torch.testing.assert_close(ours.mean, exact.mean, atol=1e-6, rtol=1e-6)
    S, at = exact.covariance, exact.mask
    variance = S.diagonal(dim1=-2, dim2=-1)
    error = (variance[..., None] * variance[..., None, :] + S.square()) / (n_samples // 2)
    assert ((ours.covariance - S).abs()[at] <= 4 * error.sqrt()[at]).all()
    error = exact.log_prob_variance * (2 / (n_samples // 2)) ** 0.5
    assert ((ours.log_prob_variance - exact.log_prob_variance).abs() <= 4 * error).all()
    spread = (ours.probabilities * (1 - ours.probabilities) / n_samples).sqrt()
    assert ((ours.probabilities - exact.probabilities).abs()[at] <= 4 * spread[at]).all()


def test_the_error_falls_with_the_root_of_the_number_of_samples():
    la = fitted(prior_precision=5.0)
    batch = text_batch()
    exact = score(la, batch, K, method="exact").covariance
    errors = []
    for n_samples in (64, 1024):
        runs = [
            score(la, batch, K, n_samples=n_samples, generator=seeded(seed)).covariance
            for seed in range(8)
        ]
        errors.append(torch.stack([(run - exact).square().mean() for run in runs]).mean().sqrt())
    assert 2.5 < float(errors[0] / errors[1]) < 6.0  # the root of 16


def test_a_texts_samples_are_joint_over_its_tokens():
    la = fitted(prior_precision=2.0)
    batch = text_batch()
    ours = score(la, batch, K, n_samples=6, generator=seeded())
    directions = SampleSet(la.fitted, 6, seeded()).directions
    means, moved = explicit_samples(la, batch, directions)
    for n, mask in enumerate(batch["attention_mask"].bool()):
        f = torch.cat([means[n] + moved[n], means[n] - moved[n]])
        labels = batch["labels"][n, mask]
        logp = f.log_softmax(-1)[:, :-1].gather(2, labels[1:].clamp(min=0).expand(6, -1)[..., None])
        logp = (logp[..., 0] * (labels[1:] != -100)).sum(1)
        torch.testing.assert_close(ours.log_probabilities[:, n], logp, atol=1e-6, rtol=1e-6)
        p = f.softmax(-1).mean(0)[:-1][labels[1:] != -100]
        entropy = torch.special.entr(p).sum(-1)
        torch.testing.assert_close(ours.entropy[n, : len(p)], entropy, atol=1e-6, rtol=1e-6)
        aleatoric = torch.special.entr(f.softmax(-1)).sum(-1).mean(0)[:-1][labels[1:] != -100]
        information = ours.mutual_information[n, : len(p)]
        torch.testing.assert_close(information, entropy - aleatoric, atol=1e-6, rtol=1e-6)
    quantiles = ours.sequence_quantiles([0.0, 0.5, 1.0])
    torch.testing.assert_close(quantiles[0], ours.log_probabilities.amin(0))
    with pytest.raises(ValueError, match="quantiles need samples"):
        score(la, batch, K, method="exact").sequence_quantiles([0.5])


def test_an_odd_number_of_samples_and_independent_ones():
    la = fitted()
    odd, even = SampleSet(la.fitted, 5, seeded()), SampleSet(la.fitted, 6, seeded())
    assert torch.equal(odd.directions, even.directions)
    zero = torch.zeros(1)
    outputs = [x.outputs(zero, x.directions[:, :1]) for x in (odd, even)]
    assert torch.equal(outputs[0], outputs[1][:5])
    assert float(outputs[1].sum()) == 0.0
    alone = SampleSet(la.fitted, 6, seeded(), antithetic=False)
    assert len(alone.outputs(zero, alone.directions[:, :1])) == len(alone.directions) == 6


def test_padding_batches_and_pieces_change_nothing(monkeypatch):
    la = fitted()
    reference = score(la, text_batch(), K, generator=seeded())
    for batch, size in ((text_batch(pad_to=9), 1), (text_batch(pad_to=8, side="left"), 2)):
        monkeypatch.setattr(reading, "ROOM", 1)
        other = score(la, batch, K, generator=seeded(), batch_size=size)
        for field in (*FIELDS, "tail_probability", "log_probabilities"):
            one, theirs = getattr(other, field), getattr(reference, field)
            torch.testing.assert_close(one, theirs, atol=1e-6, rtol=1e-6)


def test_the_models_attention_modes_weights_and_hooks_are_left():
    la = fitted()
    model = la.logits_model.model
    model.train()
    base = model.get_base_model()
    base.set_attn_implementation("sdpa")
    before = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    weights = [p.detach().clone() for p in model.parameters()]
    seen = []

    def broken(ids, scores):
        seen.append(base.config._attn_implementation)
        raise KeyError("a user's processor")

    score(la, text_batch(), K)
    with pytest.raises(KeyError):
        generate(la, token_batch((4,))["input_ids"], 3, K, logits_processor=broken)
    assert seen == ["sdpa"] and base.config._attn_implementation == "sdpa"
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))


def test_threads_score_and_run_the_model_at_once():
    la = fitted()
    model, batch = la.logits_model.model.eval(), text_batch()
    expected = score(la, batch, K, generator=seeded()).log_probabilities
    plain = model(input_ids=batch["input_ids"]).logits
    found, outputs = [], []

    def scoring():
        found.extend(score(la, batch, K, generator=seeded()).log_probabilities for _ in range(3))

    threads = [threading.Thread(target=scoring) for _ in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        outputs.append(model(input_ids=batch["input_ids"]).logits)
    assert len(found) == 6
    for values in found:
        torch.testing.assert_close(values, expected)
    assert all(torch.equal(out, plain) for out in outputs)


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


def test_half_precision_and_gradient_checkpointing():
    la = language_posterior(dtype=torch.float32)
    model = la.logits_model.model
    reference = score(la, text_batch(), K, generator=seeded())
    model.apply(lambda module: setattr(module, "gradient_checkpointing", True))
    again = score(la, text_batch(), K, generator=seeded())
    torch.testing.assert_close(again.log_probabilities, reference.log_probabilities)
    model.apply(lambda module: setattr(module, "gradient_checkpointing", False))
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    coarse = score(la, text_batch(), K, generator=seeded())
    assert coarse.log_probabilities.dtype == torch.float32
    close = {"atol": 0.15, "rtol": 0.05}
    torch.testing.assert_close(coarse.log_probabilities, reference.log_probabilities, **close)


class Linear4bit(torch.nn.Linear):
    """Named like bitsandbytes' layer."""


class NoForwardDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad


class Opaque(torch.nn.Module):
    def forward(self, x):
        return NoForwardDerivative.apply(x)


def test_what_has_no_forward_derivative_is_refused_by_name():
    la = fitted()
    layers = la.logits_model.model.get_base_model().model.layers
    kept = layers[0].mlp.act_fn
    layers[0].mlp.act_fn = Opaque()
    with pytest.raises(ValueError, match="without forward derivative"):
        score(la, text_batch(), K)
    layers[0].mlp.act_fn = kept
    o_proj = layers[1].self_attn.o_proj
    layers[1].self_attn.o_proj = Linear4bit(16, 16, bias=False).double()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.o_proj is quantised"):
        score(la, text_batch(), K)
    layers[1].self_attn.o_proj = o_proj
    with evaluation_mode(la.model):
        score(la, text_batch(), K)
    o_proj.lock = threading.Lock()  # cannot be copied
    with pytest.raises(ValueError, match="cannot be copied"):
        score(la, text_batch(), K)
