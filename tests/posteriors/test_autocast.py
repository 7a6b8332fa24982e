"""A caller's autocast reaches the model and nothing else; inference mode reaches nothing."""

import copy
from functools import partial

import pytest
import torch
from laplace import Laplace
from torch import inference_mode

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
    LoraGGN,
    LowRankLoraLaplace,
)
from laplace_lora.models.last_layer_model import LastLayerModel
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import LOW
from support.references import assert_near

CLASSES = [
    (KronLoraLaplace, LOW),
    (KronLoraLaplace, {"eigenvalue_correction": True}),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (FullLoraLaplace, {}),
    (LowRankLoraLaplace, {"rank": 5}),
]


def model(inside=False):
    """A classifier; its own forward pass under autocast, or a plain one."""
    plain = peft_model("bert", dtype=torch.float32).eval()
    if inside:
        base = plain.get_base_model()
        kind = type(base)
        forward = torch.autocast("cpu", torch.bfloat16)(kind.forward)
        base.__class__ = type(kind.__name__, (kind,), {"forward": forward})
    return plain


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_around_the_calls_it_is_as_inside_the_model(cls, kwargs):
    around, inside = (cls(model(m), "classification", **kwargs) for m in (False, True))
    batch = token_batch((4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        around.fit(loader())
        around.optimize_prior_precision()
        p = around(batch)
        rows = around.predict(loader())
        evidence = around.log_marginal_likelihood()
    inside.fit(loader())
    inside.optimize_prior_precision()
    assert p.dtype == torch.float32
    assert float(around.prior_precision) == pytest.approx(float(inside.prior_precision), rel=1e-4)
    assert_near(p, inside(batch), 1e-5)
    assert_near(rows.probs, inside.predict(loader()).probs, 1e-5)
    assert_near(evidence, inside.log_marginal_likelihood(), 1e-4)


OF_WEIGHTS = {
    "sample": lambda la, Js, v: la.sample(2, generator=seeded()),
    "log_prob": lambda la, Js, v: la.log_prob(v).detach(),
    "square_norm": lambda la, Js, v: la.square_norm(v).detach(),
    "weight_variance": lambda la, Js, v: la.weight_variance(),
    "marginals": lambda la, Js, v: torch.cat([s.flatten() for _, s in la.marginals().values()]),
    "functional_variance": lambda la, Js, v: la.functional_variance(Js),
    "functional_covariance": lambda la, Js, v: la.functional_covariance(Js),
    "posterior_covariance": lambda la, Js, v: getattr(la, "posterior_covariance", v),
    "posterior_scale": lambda la, Js, v: getattr(la, "posterior_scale", v),
}
ALGEBRA = [*CLASSES, (FullLoraLLLaplace, {}), (DiagLoraLLLaplace, {})]


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("cls,kwargs", ALGEBRA)
@pytest.mark.parametrize("around", [partial(torch.autocast, "cpu", torch.bfloat16), inference_mode])
def test_what_is_said_of_weights_is_the_same_in_it(cls, kwargs, around):
    la = cls(model(), "classification", **kwargs)
    la.fit(loader())
    Js = torch.randn(4, 3, la.n_params, generator=seeded())
    v = la.mean + 0.1 * torch.randn(la.n_params, generator=seeded())
    for name, method in OF_WEIGHTS.items():
        with around():
            inside = method(la, Js, v)
        assert torch.equal(inside, method(la, Js, v)), name


@pytest.mark.parametrize("pred_type", ["glm", "nn"])
@pytest.mark.parametrize("make", [KronLoraLaplace, FullLoraLLLaplace])
def test_samples_of_functions_are_the_same_in_inference_mode(make, pred_type):
    la = make(model(), "classification")
    la.fit(loader())
    batch = token_batch((4, 2))
    for method in (la.functional_samples, la.predictive_samples):
        with inference_mode():
            samples = method(batch, pred_type, n_samples=3, generator=seeded())
        assert torch.equal(samples, method(batch, pred_type, n_samples=3, generator=seeded()))


@pytest.mark.parametrize(
    "make", [KronLoraLaplace, FullLoraLLLaplace, partial(FunctionalLoraLLLaplace, n_subset=7)]
)
def test_samples_of_functions_are_as_if_it_were_inside_the_model(make):
    around, inside = (make(model(m), likelihood="classification") for m in (False, True))
    batch = token_batch((4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        around.fit(loader())
        functions = around.functional_samples(batch, n_samples=3, generator=seeded())
        probs = around.predictive_samples(batch, n_samples=3, generator=seeded())
    inside.fit(loader())
    assert_near(functions, inside.functional_samples(batch, n_samples=3, generator=seeded()), 1e-5)
    assert_near(probs, inside.predictive_samples(batch, n_samples=3, generator=seeded()), 1e-5)


@pytest.mark.filterwarnings("ignore:Use of method='marglik'")
def test_a_gaussian_process_predicts_and_is_tuned_in_inference_mode():
    la = FunctionalLoraLLLaplace(model(), "classification", n_subset=7)
    la.fit(loader())
    batch = token_batch((4, 2))
    with inference_mode():
        p = la(batch)
        la.optimize_prior_precision(n_steps=3)
        prior = la.prior_precision
    other = FunctionalLoraLLLaplace(model(), "classification", n_subset=7)
    other.fit(loader())
    assert torch.equal(p, other(batch))
    other.optimize_prior_precision(n_steps=3)
    assert torch.equal(other.prior_precision, prior)


def test_a_gaussian_process_computes_its_kernel_without_it():
    make = partial(FunctionalLoraLLLaplace, likelihood="classification", n_subset=7)
    around, inside = (make(model(m)) for m in (False, True))
    batch = token_batch((4, 2))
    with torch.autocast("cpu", torch.bfloat16):
        around.fit(loader())
        said = [*around._glm_predictive_distribution(batch), around.log_marginal_likelihood()]
    inside.fit(loader())
    expected = [*inside._glm_predictive_distribution(batch), inside.log_marginal_likelihood()]
    for ours, theirs in zip(said, expected, strict=True):
        assert ours.dtype == torch.float32
        assert_near(ours, theirs, 1e-5)


def test_autocast_is_on_again_after_an_error():
    la = KronLoraLaplace(model(), "classification", **LOW)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(TypeError, match="DataLoader"):
            la.fit([token_batch((4, 2))])
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sampled_weights_are_not_those_that_autocast_keeps(compiled):
    """It keeps half-precision copies of weights until its block ends, if its cache is on."""
    plain = model()
    la = KronLoraLaplace(plain, "classification", **LOW)
    la.fit(loader())
    if compiled:  # and so sampled in place
        plain.compile(backend="eager")
    batch = token_batch((4, 2))
    inputs = {name: values for name, values in batch.items() if name != "labels"}
    samples = []
    for cache in (True, False):
        generator = torch.Generator().manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            before = plain(**inputs).logits
            samples.append(la.functional_samples(batch, "nn", 5, generator=generator))
            assert torch.equal(plain(**inputs).logits, before)
    assert torch.equal(*samples)
    assert samples[0].std(0).min() > 0


@pytest.mark.parametrize("make", [KronLoraLLLaplace, KronLoraLaplace])
def test_what_is_made_in_inference_mode_can_be_fitted(make):
    plain = model()
    with inference_mode():
        la = make(plain, likelihood="classification")
    la.fit(loader())
    expected = make(plain, likelihood="classification")
    expected.fit(loader())
    batch = token_batch((4, 2))
    assert torch.equal(la(batch), expected(batch))


def test_plain_last_layers_can_be_fitted_if_they_are_made_in_inference_mode():
    plain, batch = model(), token_batch((4, 2))
    with inference_mode():
        inside = LastLayerModel(LogitsModel(plain))
    heads = inside, LastLayerModel(LogitsModel(plain))
    made, expected = (
        Laplace(head, "classification", "last_layer", "diag", backend=LoraGGN) for head in heads
    )
    made.fit(loader())
    expected.fit(loader())
    assert torch.equal(made(batch), expected(batch))


def test_what_is_taken_over_in_inference_mode_can_be_differentiated(tmp_path):
    plain, batch = model(), token_batch((4, 2))
    la, merged, by_state, adopted = (KronLoraLaplace(plain, "classification") for _ in range(4))
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    merged.fit(loader(lengths=(3, 5), seed=1))
    both = copy.deepcopy(merged)
    both.merge([la])
    with inference_mode():
        by_file = KronLoraLaplace.from_pretrained(plain, tmp_path)
        by_state.load_state_dict(la.state_dict())
        adopted.adopt(la.curvature, la.n_data, loader())
        merged.merge([la])
    pairs = (by_file, la), (by_state, la), (adopted, la), (merged, both)
    for ours, expected in pairs:
        ours.enable_backprop = True
        assert_near(ours(batch).detach(), expected(batch).detach(), 1e-6)
