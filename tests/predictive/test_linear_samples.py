"""Class probabilities from samples of the linearised model: exact where theory says so."""

import logging

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LowRankLoraLaplace,
)
from laplace_lora.evaluation import evaluate
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.information import entropies_of
from laplace_lora.models.tangents.forward_mode import ForwardMode
from laplace_lora.predictive import linear_samples
from laplace_lora.predictive import tangents as in_forward_mode
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.linear_samples import LinearSamples, takes_samples
from laplace_lora.predictive.sample_set import SampleSet
from support.batches import loader, token_batch
from support.generation import seeded
from support.models import peft_model
from support.opaque import Opaque
from support.posteriors import LOW, fitted_on, posterior
from support.preferences import pair_batch, reward_posterior
from support.references import assert_near
from support.sweeps import rest_slow

BATCH = token_batch((4, 6, 2, 5), pad_to=8, seed=5)
X = {key: value for key, value in BATCH.items() if key != "labels"}
MODELS = ["llama", "llama-lm", "bert", "roberta", "gpt2", "gpt2-lm", "t5-lm"]
MANY = 60


@pytest.fixture
def all_at_once(monkeypatch):
    monkeypatch.setattr(in_forward_mode, "AT_ONCE", 4096)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_tangents_are_jacobians_times_directions(name, side, monkeypatch):
    la = posterior(DiagLoraLaplace, name)  # which never saw padding on the left
    x = {**token_batch((4, 6, 2), pad_to=8, side=side, seed=5)}
    monkeypatch.setattr(in_forward_mode, "AT_ONCE", 2)
    mean, tangents = LinearSamples(la.fitted, 6, seeded()).tangents(x, LOGITS)
    directions = SampleSet(la.fitted, 6, seeded()).directions
    f, jacobians = Predictor(la.fitted).readout_jacobians(x, LOGITS)
    blocks = zip(jacobians, directions.split(la.engine.sizes, 1), strict=True)
    expected = sum(torch.einsum("ncp,kp->knc", J.flatten(2), d) for J, d in blocks)
    assert_near(mean, f, 1e-12)
    assert_near(tangents, expected, 1e-5)


@pytest.mark.parametrize(
    "cls, options",
    [
        (KronLoraLaplace, {}),
        (KronLoraLaplace, LOW),
        (KronLoraLaplace, {"eigenvalue_correction": True}),
        (DiagLoraLaplace, {}),
        (FullLoraLaplace, {}),
        (LowRankLoraLaplace, {"rank": 5}),
        (KronLoraLLLaplace, {}),
    ],
)
def test_moments_and_probabilities_are_the_exact_ones(cls, options, all_at_once):
    la = posterior(cls, "bert", **options)
    la.prior_precision = 10.0
    la.covariance_scale, la.likelihood_temperature = 1.7, 1.3
    exact = la.predict(X, method="exact")
    n_samples = 4096
    ours = la.predict(X, method="sampled", n_samples=n_samples, generator=seeded())
    assert_near(ours.mean, exact.mean, 1e-12)
    S = exact.covariance
    variance = S.diagonal(dim1=-2, dim2=-1)
    error = (variance[..., None] * variance[..., None, :] + S.square()) / (n_samples // 2)
    assert ((ours.covariance - S).abs() <= 4 * error.sqrt()).all()
    # Four standard errors of probabilities, estimated from runs of a sixteenth of the samples.
    runs = [
        la.predict(X, method="sampled", n_samples=n_samples // 16, generator=seeded(seed))
        for seed in range(1, 9)
    ]
    for field in ("probs", "entropy", "mutual_information"):
        found = torch.stack([getattr(run, field) for run in runs])
        difference = (getattr(ours, field) - getattr(exact, field)).abs()
        # Entropies are biased by the number of samples, their quadrature by that of points.
        assert (difference <= found.std(0) + 2e-3).all()


def test_calls_data_sets_and_batches_of_all_sizes_agree():
    la = posterior(name="llama-lm")
    whole = la.predict(loader(7), method="sampled")
    for size in (1, 3):
        parts = la.predict(loader(size), method="sampled")
        for field in ("mean", "covariance", "probs", "entropy", "mutual_information"):
            assert_near(getattr(parts, field), getattr(whole, field), 1e-6)
    batch = next(iter(loader(7)))
    assert_near(la(batch, method="sampled"), whole.probs, 1e-6)
    assert torch.equal(la(batch, method="sampled"), la(batch, method="sampled"))
    report = evaluate(lambda x: la(x, method="sampled"), loader(2), bootstrap=2)
    assert_near(report.probs, whole.probs.float(), 1e-6)
    seeds = [la(batch, method="sampled", generator=seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(seeds[0], seeds[1]) and not torch.equal(seeds[0], seeds[2])
    few = la(batch, method="sampled", n_samples=2, generator=seeded())
    assert not torch.equal(few, seeds[0])


def many_classes(cls=KronLoraLaplace):
    options = {"backend_kwargs": {"stochastic": True, "num_samples": 1}, "prior_precision": 10.0}
    la = cls(peft_model("bert", num_labels=MANY), "classification", **options)
    la.fit(loader(), evidence_correction=False)
    return la


def test_auto_takes_the_cheaper_way():
    la, few = many_classes(), posterior(name="bert")
    assert torch.equal(la(X), la(X, method="sampled"))
    assert torch.equal(la.predict(X).probs, la.predict(X, method="sampled").probs)
    assert not torch.equal(la(X), la(X, method="exact"))
    assert torch.equal(few(X), few(X, method="exact"))
    assert not torch.equal(few(X), few(X, method="sampled"))
    # More samples than contrasts cost more than exact moments.
    assert torch.equal(la(X, n_samples=100), la(X, method="exact"))
    # Other links keep their definitions, and a head's Jacobians are cheap.
    for link in ("probit", "mc"):
        drawn = [la(X, link_approx=link, generator=seeded(), method=m) for m in ("auto", "exact")]
        assert torch.equal(*drawn)
    assert not takes_samples(many_classes(KronLoraLLLaplace).fitted, "auto", "quadrature", 64)
    assert takes_samples(la.fitted, "auto", "quadrature", 78)
    assert not takes_samples(la.fitted, "auto", "quadrature", 79)


def test_auto_computes_exact_moments_where_tangents_cannot_pass(caplog):
    la = many_classes()
    la.model.model.get_base_model().bert.encoder.layer[0].output.dropout = Opaque()
    with caplog.at_level(logging.INFO, logger=linear_samples.__name__):
        found, called = la.predict(loader(2)), la(X)
    assert caplog.text.count("exact moments") == 2
    assert torch.equal(found.probs, la.predict(loader(2), method="exact").probs)
    assert torch.equal(called, la(X, method="exact"))
    for ask in (la, la.predict):
        with pytest.raises(ValueError, match="without forward derivative"):
            ask(X, method="sampled")


@pytest.mark.parametrize(
    "options, match",
    [
        ({"method": "samples"}, "method must be one of"),
        ({"link_approx": "probit"}, "needs method='exact'"),
        ({"link_approx": "mc"}, "needs method='exact'"),
        ({"pred_type": "nn"}, "need method='exact'"),
        ({"diagonal_output": True}, "need method='exact'"),
        ({"joint": True}, "need method='exact'"),
        ({"n_samples": 0}, "n_samples must be a whole number"),
    ],
)
def test_what_samples_do_not_do_is_refused(options, match):
    la = posterior(name="bert")
    with pytest.raises(ValueError, match=match):
        la(X, **{"method": "sampled", **options})


def test_regressions_rewards_and_gradients_are_refused():
    la = KronLoraLaplace(peft_model("bert"), "regression")
    la.fit(loader(likelihood="regression"))
    for ask in (la, la.predict):
        with pytest.raises(ValueError, match="regression has none"):
            ask(X, method="sampled")
    rewards = reward_posterior()
    for ask in (rewards, rewards.predict):
        with pytest.raises(ValueError, match="single rewards have none"):
            ask(X, method="sampled")
    differentiable = posterior(name="bert", enable_backprop=True)
    with pytest.raises(ValueError, match="cannot be differentiated"):
        differentiable(X, method="sampled")


@pytest.mark.parametrize("name", rest_slow(["bert", "llama-lm"], 0))
def test_samples_of_a_recentred_posterior_lie_around_its_mean(name, in_double):
    la = posterior(name=name, prior_precision=10.0)
    unmoved = la.predict(X, method="exact").mean
    la.recentre(0.7)
    la.covariance_scale, la.likelihood_temperature = 1.7, 1.3
    exact = la.predict(X, method="exact")
    ours = la.predict(X, method="sampled", n_samples=2048, generator=seeded())
    torch.testing.assert_close(ours.mean, exact.mean, atol=1e-8, rtol=1e-8)
    assert not torch.allclose(ours.mean, unmoved / 1.3, atol=1e-3)
    samples = SampleSet(la.fitted, 2048, seeded())
    mean, tangents = LinearSamples(la.fitted, 2048, seeded()).tangents(X, LOGITS)
    average, moved = (
        samples.outputs(mean, tangents).mean(0),
        Predictor(la.fitted).distribution(X)[0],
    )
    torch.testing.assert_close(average, moved, atol=1e-8, rtol=1e-8)
    assert_near(ours.probs, exact.probs, 0.02)
    S = exact.covariance
    variance = S.diagonal(dim1=-2, dim2=-1)
    error = (variance[..., None] * variance[..., None, :] + S.square()) / 1024
    assert ((ours.covariance - S).abs() <= 4 * error.sqrt()).all()
    few = many_classes()
    few.recentre(5.0)
    assert torch.equal(few(X), few(X, method="sampled"))


def test_pairs(all_at_once):
    la = reward_posterior(prior_precision=5.0)
    pairs = pair_batch(seed=3)
    exact = la.predict(pairs, method="exact")
    ours = la.predict(pairs, method="sampled", n_samples=4096)
    assert_near(ours.mean, exact.mean, 1e-12)
    bound = 4 * (2 / 2048) ** 0.5 * exact.covariance
    assert ((ours.covariance - exact.covariance).abs() <= bound).all()
    assert_near(ours.probs, exact.probs, 0.02)
    assert_near(la(pairs, method="sampled", n_samples=4096), ours.probs, 1e-6)


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"target_modules": "all-linear"}],
    ids=["dora", "all-linear"],
)
def test_other_adapters_gradient_checkpointing_and_half_precision(options):
    model = peft_model("llama-lm", dtype=torch.float32, **options)
    kinds = {"cls": DiagLoraLaplace, "uncovered": "diag", "prior_precision": 20.0}
    la = fitted_on(model, "llama-lm", **kinds)
    reference = la(X, method="sampled")
    exact = la(X, method="exact")
    assert (reference - exact).abs().max() < 0.1
    model.apply(lambda module: setattr(module, "gradient_checkpointing", True))
    model.train()
    assert_near(la(X, method="sampled"), reference, 1e-6)
    assert model.training
    model.apply(lambda module: setattr(module, "gradient_checkpointing", False))
    sampled, moments = {}, {}
    with torch.autocast("cpu", torch.bfloat16):
        sampled["autocast"], moments["autocast"] = both(la)
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    sampled["base"], moments["base"] = both(la)
    for where, found in sampled.items():
        assert found.dtype == torch.float32
        # No more is lost than by exact moments.
        lost = (moments[where] - exact).abs().max()
        assert (found - reference).abs().max() < 3 * lost + 0.01


def both(la):
    return la(X, method="sampled"), la(X, method="exact")


def test_a_model_that_carries_other_values_is_refused(monkeypatch):
    la = posterior(name="bert")
    run = ForwardMode.run

    def shifted(self, *args, **kwargs):
        values, tangents = run(self, *args, **kwargs)
        return {key: value + 1 for key, value in values.items()}, tangents

    monkeypatch.setattr(ForwardMode, "run", shifted)
    with pytest.raises(RuntimeError, match="other outputs where it carries tangents"):
        la(X, method="sampled")


def test_the_epistemic_part_of_samples_is_never_negative():
    logits = torch.randn(2000, 4, generator=torch.Generator().manual_seed(0))
    _, information = entropies_of(logits.log_softmax(-1).expand(64, -1, -1))
    assert bool((information >= 0).all()) and float(information.max()) < 1e-12
