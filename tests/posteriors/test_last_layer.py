"""Last-layer posteriors: the exact GGN of the head, by every way in."""

import copy
from functools import partial

import pytest
import torch
from laplace import LLLaplace
from torch.nn.utils import parameters_to_vector

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import ValidationCache
from support.batches import loader, token_batch, validation
from support.last_layer import MODELS, PARAMETRIC, PLAIN, by_name, last_layer_logits_model, padded
from support.models import peft_model
from support.references import assert_near
from support.sweeps import rest_slow

BATCH = token_batch((4, 2, 6), seed=9)


@torch.no_grad()
def twice(model):
    for tensor in LogitsModel(model).head_tensors():
        tensor.mul_(2)


def explicit_head_ggn(model, data):
    """GGN of the head's weight and bias by a loop over examples and outputs."""
    features, weight, bias = [], *model.head_tensors()
    model.eval()
    total = 0
    for batch in data:
        phi, logits = model.features(batch)
        features.append(phi)
        for a, f in zip(phi.detach(), logits.detach(), strict=True):
            p = f.softmax(-1)
            columns = [torch.kron(torch.eye(len(f)).double()[c], a) for c in range(len(f))]
            J = torch.stack(columns)
            if bias is not None:
                J = torch.cat([J, torch.eye(len(f)).double()], dim=1)
            total = total + J.T @ (p.diag() - torch.outer(p, p)) @ J
    assert weight.shape == (len(f), len(a))
    return total


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_a_new_fit_takes_the_head_as_it_is_now(cls):
    model = LogitsModel(peft_model("bert"))
    la = cls(model, "classification")
    la.fit(loader())
    with torch.no_grad():
        for tensor in model.head_tensors():
            tensor.mul_(2)
    with pytest.raises(RuntimeError, match="have changed since"):
        la(BATCH)
    with pytest.raises(RuntimeError, match="have changed since"):
        la.fit(loader(), override=False)
    la.fit(loader())
    new = cls(model, "classification")
    new.fit(loader())
    assert_near(la.mean, new.mean)
    assert_near(la(BATCH), new(BATCH))


def answers(la):
    """Moments of outputs and the evidence, which every class has."""
    return [*la._glm_predictive_distribution(BATCH), la.log_marginal_likelihood()]


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("cls", [*PARAMETRIC, partial(FunctionalLoraLLLaplace, n_subset=4)])
def test_a_fit_again_is_in_the_dtype_that_the_model_is_in_now(cls, likelihood):
    model, data = peft_model("bert"), loader(likelihood=likelihood)
    options = {"prior_precision": 2.0} | ({"sigma_noise": 0.5} if likelihood[0] == "r" else {})
    la = cls(model, likelihood=likelihood, **options)
    for dtype in (torch.float64, torch.float32, torch.float64, torch.bfloat16):
        model.to(dtype)
        la.fit(data)
        new = cls(model, likelihood=likelihood, **options)
        new.fit(data)
        for found, expected in zip(answers(la), answers(new), strict=True):
            assert found.dtype == expected.dtype and torch.equal(found, expected)
        assert la.prior_precision.dtype == la.sigma_noise.dtype == la.mean.dtype


@pytest.mark.parametrize("change", [torch.nn.Module.float, twice])
@pytest.mark.parametrize("cls", PARAMETRIC)
def test_a_fit_that_fails_leaves_the_earlier_head(cls, change):
    model = peft_model("bert")
    la = cls(model, "classification")
    la.fit(loader())
    expected, weights = answers(la), copy.deepcopy(model.state_dict())
    change(model)
    with pytest.raises(ValueError, match="labels must lie in"):
        la.fit(loader(labels=4))
    model.double().load_state_dict(weights)
    assert all(map(torch.equal, answers(la), expected))


@pytest.mark.filterwarnings("ignore:the model itself answers a padded text otherwise")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("route", ["lora_last_layer", "last_layer"])
def test_full_structure_is_the_exact_ggn_of_the_head(name, side, route):
    model = last_layer_logits_model(name)
    la = by_name(model, "full", route)
    la.fit(padded(side))
    assert_near(la.H, explicit_head_ggn(model, padded(side)))


@pytest.mark.parametrize(
    "name,side",
    # Encoders number their positions from the left: padding there would be another input.
    [
        *((name, "right") for name in MODELS),
        *((name, "left") for name in MODELS if "llama" in name),
    ],
)
@pytest.mark.parametrize("structure", PLAIN)
def test_every_way_keeps_the_models_own_logits(name, structure, side):
    model = last_layer_logits_model(name)
    own = model.eval()(token_batch((4, 2, 6), seed=9, side=side)).detach()
    for route in ("lora_last_layer", "last_layer") if structure != "gp" else ("lora_last_layer",):
        la = by_name(model, structure, route)
        assert isinstance(la, PLAIN[structure][1])
        assert type(la) is PLAIN[structure][route == "last_layer"]
        la.fit(padded(side))
        mean, covariance = la._glm_predictive_distribution(
            token_batch((4, 2, 6), seed=9, pad_to=8, side=side)
        )
        assert_near(mean, own)
        assert_near(covariance, covariance.mT)
        assert la(BATCH).isfinite().all()


@pytest.mark.parametrize("structure", ["kron", "diag", "full"])
@pytest.mark.parametrize("name", ["llama", "bert-frozen", "llama-lm"])
def test_both_routes_agree(structure, name):
    model = last_layer_logits_model(name)
    ours, theirs = (by_name(model, structure, r) for r in ("lora_last_layer", "last_layer"))
    for la in (ours, theirs):
        la.fit(loader())
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    for link in ("probit", "bridge"):
        assert_near(ours(BATCH, link_approx=link), theirs(BATCH, link_approx=link))


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_posterior_protocol(cls):
    la = cls(last_layer_logits_model("llama"), "classification")
    assert isinstance(la, LLLaplace)
    with pytest.raises(AttributeError, match="not fitted"):
        la(BATCH)
    la.fit(loader(), progress_bar=True)
    before = la.log_marginal_likelihood()
    la.optimize_prior_precision(correction=False)
    assert la.log_marginal_likelihood() > before
    validation = loader(lengths=(4, 6, 2, 5), seed=7)
    la.optimize_prior_precision(method="gridsearch", val_loader=validation, grid_size=5)
    la.optimize_prior_precision(method="val_gd", val_loader=validation, n_steps=5)
    result = la.calibrate(validation)
    assert result.nll_after <= result.nll_before
    assert_near(la(BATCH).sum(-1), torch.ones(3).double())
    other = cls(last_layer_logits_model("llama"), "classification")
    other.load_state_dict(la.state_dict())
    assert_near(other(BATCH), la(BATCH))


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_one_pass_grid_of_the_head(cls):
    la = cls(last_layer_logits_model("bert"), "classification")
    la.fit(loader())
    (batch,) = loader(7)
    rows = torch.tensor([[-1.0, 1, 0], [-1, 0, 1]], dtype=torch.float64)
    for readout, functions in ((LOGITS, torch.eye(3).double()), (CONTRASTS, rows)):
        la.prior_precision = 1.0
        grid = torch.tensor([0.01, 1.0, 30.0]).double()
        variances = lambda _, e: 1 / (e.unsqueeze(1) + grid)  # noqa: B023, E731
        mean, forms = Predictor(la.fitted).forms(batch, readout, variances)
        found = sum(form for _, form in forms)
        for i, delta in enumerate(grid.tolist()):
            la.prior_precision = delta
            expected_mean, expected = la._glm_predictive_distribution(batch)
            covariance = functions @ expected @ functions.T
            assert_near(found[..., i], covariance)
            assert_near(mean, expected_mean @ functions.T)


def test_layerwise_priors_where_the_structure_allows():
    for cls in (KronLoraLLLaplace, DiagLoraLLLaplace):
        la = cls(last_layer_logits_model("bert"), "classification")
        la.fit(loader())
        la.optimize_prior_precision(correction=False)
        scalar = la.log_marginal_likelihood()
        la.optimize_prior_precision(prior_structure="layerwise", correction=False)
        assert len(la.prior_precision) == 2
        assert la.log_marginal_likelihood() >= scalar
        assert la(BATCH).isfinite().all()
    la = FullLoraLLLaplace(last_layer_logits_model("bert"), "classification")
    la.fit(loader())
    with pytest.raises(ValueError, match="a full matrix cannot have"):
        la.optimize_prior_precision(prior_structure="layerwise")


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_sampled_heads_compute_the_features_once_and_touch_nothing(cls):
    model = last_layer_logits_model("llama-lm")
    la = cls(model, "classification", prior_precision=100.0)
    la.fit(loader())
    weights = parameters_to_vector(model.parameters()).clone()
    head = la.model.last_layer.weight.clone()
    passes = []
    handle = model.register_forward_hook(lambda *args: passes.append(1))
    samples = la.predictive_samples(BATCH, pred_type="nn", n_samples=2000)
    handle.remove()
    assert len(passes) == 1
    glm = la(BATCH, link_approx="mc", n_samples=4000)
    torch.testing.assert_close(samples.mean(0), glm, atol=0.03, rtol=0)
    assert torch.equal(parameters_to_vector(model.parameters()), weights)
    assert torch.equal(la.model.last_layer.weight, head)


@pytest.mark.parametrize("structure", rest_slow(["kron", "diag", "full"], 0))
def test_samples_of_laplace_torchs_own_classes_reach_the_head_that_runs(structure):
    model = last_layer_logits_model("bert")
    la = by_name(model, structure, "last_layer")
    la.fit(loader())
    la.prior_precision = 30.0
    before = la.model(BATCH)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    samples = la.functional_samples(BATCH, pred_type="nn", n_samples=400)
    torch.testing.assert_close(samples.mean(0), mean, atol=0.08, rtol=0)
    gaps = samples - mean
    sampled = torch.einsum("snc,snd->ncd", gaps, gaps) / len(gaps)
    assert_near(sampled, covariance, 0.3)
    torch.testing.assert_close(la.model(BATCH), before)


@pytest.mark.parametrize("cls", PARAMETRIC)
def test_last_layer_regression(cls):
    la = cls(LogitsModel(peft_model("bert")), "regression", sigma_noise=0.7)
    la.fit(loader(likelihood="regression"))
    la.optimize_prior_precision(tune_sigma_noise=True)
    mean, covariance = la(BATCH)
    assert mean.shape == (3, 3) and covariance.shape == (3, 3, 3)
    assert la.sigma_noise != 0.7


def test_half_precision_models_have_single_precision_heads():
    la = KronLoraLLLaplace(peft_model("bert", dtype=torch.bfloat16), "classification")
    la.fit(loader())
    assert la.model.last_layer.weight.dtype == torch.float32
    assert la(BATCH).dtype == torch.float32


def test_low_rank_sides_on_request():
    dense = KronLoraLLLaplace(last_layer_logits_model("bert"), "classification")
    low = KronLoraLLLaplace(
        last_layer_logits_model("bert"), "classification", factor_rank=2, low_rank_threshold=4
    )
    for la in (dense, low):
        la.fit(loader())
    assert low.H.blocks[0][1].multiplicity == 14
    assert dense.H.blocks[0][1].multiplicity == 0
    assert not torch.allclose(low(BATCH), dense(BATCH), rtol=1e-9)


@pytest.mark.parametrize("change", ["fit", "tune", "calibrate", "temperature", "in place", "load"])
def test_a_dense_covariance_is_that_of_the_moment(change):
    """laplace-torch keeps the first one that it was asked for."""
    model = peft_model("bert")
    la = FullLoraLLLaplace(model, "classification")
    la.fit(loader())
    jacobian = torch.randn(1, 1, la.n_params, dtype=torch.float64)
    before = la.functional_variance(jacobian)
    if change == "fit":
        la.fit(validation())
    elif change == "tune":
        la.optimize_prior_precision(method="marglik", correction=False)
    elif change == "calibrate":
        la.calibrate(validation())
    elif change == "temperature":
        la.temperature = 3.0
    elif change == "in place":
        la.prior_precision.mul_(10)
    else:
        other = FullLoraLLLaplace(model, "classification", prior_precision=30.0)
        other.fit(loader())
        la.load_state_dict(other.state_dict())
    expected = jacobian @ torch.linalg.inv(la.posterior_precision) @ jacobian.mT
    assert_near(la.functional_variance(jacobian), expected, 1e-9)
    assert not torch.allclose(expected, before)
    assert_near(la.posterior_scale @ la.posterior_scale.T, la.posterior_covariance, 1e-9)


@pytest.mark.parametrize("prior", [(50.0, 0.05), (0.05, 50.0)])
def test_a_matrix_with_a_prior_for_each_tensor_is_searched_under_it(prior):
    la = FullLoraLLLaplace(peft_model("roberta"), "classification")
    la.fit(loader())
    la.prior_precision = torch.tensor(prior).double()
    predictor, groups = Predictor(la.fitted), torch.zeros(2, dtype=torch.long)
    cache = ValidationCache(predictor, validation(), groups, CONTRASTS)
    found = [predictor.readout_moments(batch, CONTRASTS)[1] for batch in validation()]
    assert_near(cache.covariance(torch.ones(1).double()), torch.cat(found), 1e-4)
    covariance = la.posterior_covariance
    assert_near(covariance @ la.posterior_precision, torch.eye(len(covariance)).double())
    la.optimize_prior_precision(method="marglik", correction=False)
    tuned = la.prior_precision
    la.prior_precision = 1.0
    la.optimize_prior_precision(method="marglik", correction=False)
    assert_near(tuned, la.prior_precision, 1e-6)


@pytest.mark.parametrize("delta", [1.0, 1e-5, 1e-8])
def test_a_singular_matrix_in_single_precision_bears_a_wide_prior(delta):
    """Rounding leaves eigenvalues on both sides of zero, which are no curvature."""
    data = loader(batch_size=20, lengths=(3, 6, 4, 6, 1, 5, 2) * 20)
    fits = []
    for dtype in (torch.float32, torch.float64):
        la = FullLoraLLLaplace(peft_model("roberta", dtype=dtype), "classification")
        la.fit(data)
        la.prior_precision = delta
        fits.append(la)
    single, double = fits
    assert_near(single.log_marginal_likelihood().double(), double.log_marginal_likelihood(), 1e-6)
    assert_near(single(BATCH).double(), double(BATCH), 1e-3)
    assert bool((single.weight_variance() > 0).all())
    assert_near(single.weight_variance().double(), double.weight_variance(), 1e-3)
    assert single.sample(3).isfinite().all()
