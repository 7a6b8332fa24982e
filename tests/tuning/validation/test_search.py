"""Tuning on validation data: one pass for a whole grid, and gradient descent."""

import re
import warnings

import pytest
import torch
from laplace import KronLaplace
from laplace.utils.enums import LinkApprox, PredType, TuningMethod
from laplace.utils.metrics import RunningNLLMetric
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LoraGGN,
    LowRankLoraLaplace,
)
from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.links import contrasts_of
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.groups import STRUCTURES, prior_groups
from laplace_lora.tuning.validation.cache import ValidationCache, scoring_of
from support.batches import loader, token_batch, validation
from support.models import base_model, peft_model
from support.posteriors import CLASSES, DENSE, LOW, posterior
from support.references import assert_near, validation_nll


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("link", ["probit", "bridge"])
def test_one_pass_grid_equals_laplace_torchs_loop(cls, kwargs, link):
    la = posterior(cls, **kwargs)
    grid = torch.logspace(-3, 3, 13)
    from laplace_lora.tuning.validation.search import grid_search

    best, losses = grid_search(
        Predictor(la.fitted), validation(), grid, scoring_of(la.fitted, link, 1), None, False
    )
    expected = []
    for value in grid:
        la.prior_precision = value.item()
        metric = RunningNLLMetric()
        for batch in validation():
            metric.update(la(batch, link_approx=link), batch["labels"])
        expected.append(metric.compute().double())
    assert_near(losses, torch.stack(expected), 1e-6)
    assert best == pytest.approx(grid[torch.stack(expected).argmin()].item())


@pytest.mark.slow
def test_one_pass_grid_equals_laplace_torchs_own_search():
    ours = posterior(**DENSE)
    theirs = KronLaplace(ours.model, "classification", backend=LoraGGN)
    theirs.fit(loader())
    options = {"val_loader": validation(), "grid_size": 11}
    options["link_approx"] = "probit"
    for metric in (None, RunningNLLMetric(), lambda p, y: -p[range(len(y)), y].log().mean()):
        for la in (ours, theirs):
            la.optimize_prior_precision(method="gridsearch", loss=metric, **options)
        assert ours.prior_precision.item() == pytest.approx(theirs.prior_precision.item())


def test_one_pass_visits_every_batch_once():
    la, calls = posterior(**LOW), []
    handle = la.model.register_forward_hook(lambda *args: calls.append(1))
    la.optimize_prior_precision(method="gridsearch", val_loader=validation(), link_approx="mc")
    la.optimize_prior_precision(method="val_gd", val_loader=validation())
    la.calibrate(validation())
    handle.remove()
    assert len(calls) == 3 * 3


def test_grid_bounds_and_sampling_predictive():
    la = posterior(**LOW)
    bounds = {"log_prior_prec_min": 1, "log_prior_prec_max": 2, "log_prior_prec_base": 2.0}
    la.optimize_prior_precision(method="gridsearch", val_loader=validation(), grid_size=3, **bounds)
    assert 2 <= la.prior_precision.item() <= 4
    la.optimize_prior_precision(
        "nn", "gridsearch", val_loader=validation(), grid_size=2, n_samples=2
    )
    assert la.prior_precision.item() in (pytest.approx(1e-4), pytest.approx(1e4))


@pytest.mark.parametrize("link", ["quadrature", "probit"])
def test_losses_stay_finite_where_probabilities_underflow(link):
    la = posterior(dtype=torch.float32, prior_precision=1e6, **DENSE)
    original = la.model.forward
    la.model.forward = lambda batch: original(batch) * 1e4
    from laplace_lora.tuning.validation.search import grid_search

    grid = torch.logspace(5, 8, 3)
    _, losses = grid_search(
        Predictor(la.fitted), validation(), grid, scoring_of(la.fitted, link, 1), None, False
    )
    assert losses.isfinite().all()


def test_regressions_are_searched_by_their_likelihood():
    la = KronLoraLaplace(peft_model("bert"), "regression", **DENSE)
    la.fit(loader(likelihood="regression"))
    data = loader(likelihood="regression", seed=7)
    la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=9)
    assert 1e-4 < la.prior_precision.item() <= 1e4
    la.optimize_prior_precision(method="val_gd", val_loader=data, n_steps=3)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("structure", ["scalar", "layerwise", "matrix"])
def test_gradient_descent_lowers_the_validation_loss(cls, kwargs, structure):
    la = posterior(cls, prior_precision=1e-2, **kwargs)
    before = validation_nll(la)
    options = {"val_loader": validation(), "prior_structure": structure}
    la.optimize_prior_precision(method="val_gd", n_steps=5, **options)
    few = validation_nll(la)
    la.optimize_prior_precision(method="val_gd", n_steps=60, **options)
    assert validation_nll(la) < few < before
    assert len(la.prior_precision) == (1 if structure == "scalar" else la.n_layers)


def test_descent_ends_where_the_grid_does():
    la = posterior(**DENSE)
    grid = {"val_loader": validation(), "grid_size": 161}
    la.optimize_prior_precision(method="gridsearch", **grid)
    best = validation_nll(la)
    la.prior_precision = la.prior_precision * 10
    la.optimize_prior_precision(method="val_gd", val_loader=validation(), n_steps=300)
    assert validation_nll(la) <= best + 1e-3


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_the_cached_covariance_is_that_of_the_posterior(cls, kwargs):
    prior = torch.logspace(-1, 1, posterior(cls, fit=False, **kwargs).n_layers)
    la = posterior(cls, prior_precision=prior, **kwargs)
    groups = prior_groups(la.block_names, "matrix")
    caches = [
        ValidationCache(Predictor(la.fitted), validation(8), groups, readout)
        for readout in (LOGITS, CONTRASTS)
    ]
    factors = torch.tensor([0.3, 7.0]).double()
    la.prior_precision = prior * factors[groups]
    (batch,) = validation(8)
    moments = la._glm_predictive_distribution(batch)
    for cache, (mean, covariance) in zip(caches, (moments, contrasts_of(*moments)), strict=True):
        assert_near(cache.mean, mean)
        assert_near(cache.covariance(factors), covariance, 2e-3)


@pytest.mark.parametrize("method", ["gridsearch", "val_gd"])
def test_validation_data_must_be_there_and_have_labels(method):
    la = posterior(prior_precision=2.5, **LOW)
    unlabelled = [{k: v for k, v in x.items() if k != "labels"} for x in validation().dataset]
    for data, match in (
        (None, "needs `val_loader`"),
        (DataLoader([], batch_size=2), "loader is empty"),
        (DataLoader(unlabelled, batch_size=2), "no 'labels'"),
    ):
        with pytest.raises(ValueError, match=match):
            la.optimize_prior_precision(method=method, val_loader=data)
        with pytest.raises(ValueError, match=match):
            la.calibrate(data)
    assert la.prior_precision.item() == 2.5


def test_what_does_not_go_together_is_refused():
    la = posterior(**LOW)
    with pytest.raises(ValueError, match="chooses a scalar"):
        la.optimize_prior_precision(
            method="gridsearch", val_loader=validation(), prior_structure="matrix"
        )
    with pytest.raises(ValueError, match="uses no validation data"):
        la.optimize_prior_precision(val_loader=validation())
    for method in ("gridsearch", "val_gd"):
        with pytest.raises(ValueError, match="uses no training data; leave `train_loader` out"):
            la.optimize_prior_precision(
                method=method, val_loader=validation(), train_loader=loader()
            )
    for method, name, match in (
        ("val_gd", "grid_size", "takes no 'grid_size'; method='gridsearch' does. It takes n_steps"),
        ("gridsearch", "n_steps", "'auto' or 'marglik' or 'val_gd' does. It takes loss, "),
        ("loo", "n_steps", "It takes no further arguments"),
        ("marglik", "grid_size", "method='gridsearch' does. It takes n_steps, lr, init_prior_prec"),
        ("gridsearch", "guess", "takes no 'guess'. It takes loss"),
    ):
        with pytest.raises(TypeError, match=match):
            la.optimize_prior_precision(method=method, val_loader=validation(), **{name: 3})


@pytest.mark.parametrize("method", ["loo", "widest", "marglik", "gridsearch", "val_gd"])
def test_options_of_other_methods_are_refused(method):
    la = posterior(prior_precision=2.5, **LOW)
    if method != "marglik":
        with pytest.raises(ValueError, match="correction=True belongs to method='marglik'; got"):
            la.optimize_prior_precision(method=method, correction=True)
    if method not in ("loo", "marglik"):
        match = "tune_sigma_noise=True belongs to method='loo' or method='marglik'; got"
        with pytest.raises(ValueError, match=match):
            la.optimize_prior_precision(method=method, tune_sigma_noise=True)
    if method != "loo":
        with pytest.raises(ValueError, match="recentre=False belongs to method='loo'; got"):
            la.optimize_prior_precision(method=method, recentre=False)
    if method in ("loo", "widest"):
        with pytest.raises(ValueError, match="uses no validation data"):
            la.optimize_prior_precision(method=method, val_loader=validation())
    assert la.prior_precision.item() == 2.5


@pytest.mark.parametrize("method", ["loo", "marglik", "gridsearch", "val_gd"])
def test_a_predictive_that_does_not_exist_is_refused(method):
    la = posterior(prior_precision=2.5, **LOW)
    validates = method in ("gridsearch", "val_gd")
    options = {"method": method, "val_loader": validation() if validates else None}
    for name, value, match in (
        ("pred_type", "map", "pred_type must be 'glm' or 'nn', got 'map'"),
        ("link_approx", "logit", "link_approx must be one of .* got 'logit'"),
        ("n_samples", -3, "n_samples must be a whole number, at least 1; got -3"),
    ):
        with pytest.raises(ValueError, match=match):
            la.optimize_prior_precision(**options, **{name: value})
    assert la.prior_precision.item() == 2.5


def test_callers_of_laplace_torch_may_name_its_predictive_for_every_method():
    given, plain = posterior(**LOW), posterior(**LOW)
    given.optimize_prior_precision(PredType.NN, TuningMethod.MARGLIK, link_approx=LinkApprox.PROBIT)
    plain.optimize_prior_precision(method="marglik")
    assert torch.equal(given.prior_precision, plain.prior_precision)


@pytest.mark.parametrize("method", ["auto", "marglik"])
@pytest.mark.parametrize("loop", [{"n_steps": 3}, {"prior_structure": "diag"}])
def test_the_loop_of_laplace_torch_tunes_the_prior_alone(method, loop):
    la = posterior(DiagLoraLaplace)
    for name in ("tune_sigma_noise", "correction"):
        with pytest.raises(ValueError, match=f"{name}=True does not go together with 'n_steps'"):
            la.optimize_prior_precision(method=method, **{name: True}, **loop)


def test_a_prior_of_each_weight_says_what_it_does_not_go_with():
    la = posterior(DiagLoraLaplace)
    la.optimize_prior_precision(method="marglik", prior_structure="diag", n_steps=3)
    with pytest.raises(ValueError, match="there is one for each weight") as refused:
        la.calibrate(validation())
    named = re.findall(r"'(\w+)'", str(refused.value))
    assert named and set(named) <= set(STRUCTURES)
    with pytest.raises(ValueError, match="there is one for each weight"):
        la.optimize_prior_precision(method="val_gd", val_loader=validation())
    assert len(la.prior_precision) == la.n_params


def test_a_tuning_that_fails_keeps_the_prior():
    la = posterior(prior_precision=2.5, **LOW)
    with pytest.raises(ValueError, match="needs `val_loader`"):
        la.optimize_prior_precision(method="gridsearch")
    with pytest.raises(ValueError, match="method must be 'auto'"):
        la.optimize_prior_precision(method="guess")
    broken = DataLoader([{"input_ids": torch.ones(3, dtype=torch.long)}], batch_size=1)
    with pytest.raises(ValueError, match="no 'labels'"):
        la.optimize_prior_precision(method="gridsearch", val_loader=broken, grid_size=3)
    assert la.prior_precision.item() == 2.5
    with pytest.raises(AttributeError, match="not fitted"):
        posterior(fit=False).optimize_prior_precision()


def test_grid_search_works_on_batches_with_labels():
    la = posterior(**LOW)
    la.optimize_prior_precision(method="gridsearch", val_loader=loader(), grid_size=5)
    assert la.prior_precision.item() in torch.logspace(-4, 4, 5).tolist()


def test_a_curvature_without_directions_can_be_searched():
    """That of `lora_A` alone, as long as `lora_B` is zero."""
    base = get_peft_model(base_model("bert"), LoraConfig(r=2, target_modules=["query"])).double()
    for cls in (FullLoraLaplace, LowRankLoraLaplace):
        la = cls(base.eval(), "classification", modules="lora_A")
        la.fit(loader())
        la.calibrate(validation())
        la.optimize_prior_precision(method="val_gd", val_loader=validation(), n_steps=2)
        assert la(token_batch((3, 5))).isfinite().all()


def test_a_grid_of_sampled_weights_warns_of_no_link():
    la = posterior(name="bert", **LOW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.optimize_prior_precision(
            "nn", "gridsearch", val_loader=validation(), grid_size=2, n_samples=2
        )
