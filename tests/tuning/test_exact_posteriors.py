"""Tuning of the exact posteriors."""

import pytest
import torch

from laplace_lora.likelihoods.base import CONTRASTS
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.links import contrasts_of
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import ValidationCache
from laplace_lora.tuning.validation.coupled_cache import CoupledCache
from support.batches import loader
from support.exact_posteriors import BOTH, LAYERS, NEW_BATCH, exact_posterior
from support.references import assert_near
from support.sweeps import rest_slow


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("size", [1, LAYERS])
def test_evidence_is_differentiable_in_prior_and_noise(cls, kwargs, size):
    la = exact_posterior(cls, "regression", **kwargs)
    prior = torch.linspace(0.4, 2, size).double().requires_grad_()
    noise = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, noise))


@pytest.mark.filterwarnings("ignore:the posterior predicts its training examples:UserWarning")
@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("structure", ["scalar", "matrix", "block", "layerwise"])
def test_the_evidence_is_at_its_maximum(cls, kwargs, structure):
    la = exact_posterior(cls, "regression", prior_precision=torch.linspace(1, 3, LAYERS), **kwargs)
    noise_too = structure != "scalar"
    options = {"tune_sigma_noise": noise_too, "correction": False}
    la.optimize_prior_precision(prior_structure=structure, **options)
    assert len(la.prior_precision) == (1 if structure == "scalar" else LAYERS)
    best = la.log_marginal_likelihood().item()
    prior = la.prior_precision.log().requires_grad_()
    noise = la.sigma_noise.detach().log().requires_grad_()
    value = la.log_marginal_likelihood(prior.exp(), noise.exp())
    slopes, slope = torch.autograd.grad(value, (prior, noise))
    labels = la.prior_precision.detach().log()
    by_group = [slopes[labels == label].sum().item() for label in labels.unique()]
    assert max(map(abs, by_group)) < 2e-5
    la.prior_precision, la.sigma_noise = prior.exp().detach(), noise.exp().detach()
    if noise_too:
        assert abs(slope.item()) < 2e-5
        la.optimize_prior_precision(correction=False)
        assert la.log_marginal_likelihood() < best
    else:
        la.optimize_prior_precision(tune_sigma_noise=True, correction=False)
        assert la.log_marginal_likelihood() > best


def test_laplace_torchs_adam_on_request():
    la = exact_posterior()
    la.optimize_prior_precision(prior_structure="layerwise", correction=False)
    best = la.log_marginal_likelihood()
    la.optimize_prior_precision(prior_structure="layerwise", n_steps=3)
    assert la.log_marginal_likelihood() < best
    with pytest.raises(ValueError, match="prior_structure must be"):
        la.optimize_prior_precision(prior_structure="rows")


def nll(la, data, link):
    total = [
        torch.nn.functional.nll_loss(
            la(batch, link_approx=link).log(), batch["labels"], reduction="sum"
        )
        for batch in data
    ]
    return sum(total).item()


@pytest.mark.parametrize("cls,kwargs", rest_slow(BOTH, 0))
@pytest.mark.parametrize("link,rounding", [("probit", 1e-6), ("quadrature", 1e-2)])
def test_tuning_on_a_validation_set(cls, kwargs, link, rounding):
    """The integral has fewer points in a tuning than in a prediction."""
    data = loader(3, lengths=(4, 6, 2, 5, 3), seed=7)
    # From one precision a tensor: the grid's are scalars, a calibration keeps the proportions.
    la = exact_posterior(cls, prior_precision=torch.linspace(1, 3, LAYERS), **kwargs)
    report = la.calibrate(data, link)
    assert report.nll_after <= report.nll_before
    assert nll(la, data, link) == pytest.approx(5 * report.nll_after, rel=max(rounding, 1e-3))
    assert_near(la.prior_precision / la.prior_precision[0], torch.linspace(1, 3, LAYERS).double())
    options = {"val_loader": data, "link_approx": link}
    la.optimize_prior_precision(method="gridsearch", grid_size=7, **options)
    losses = {}
    for delta in torch.logspace(-4, 4, 7).tolist():
        other = exact_posterior(cls, prior_precision=delta, **kwargs)
        losses[nll(other, data, link)] = delta
    assert la.prior_precision.item() == pytest.approx(losses[min(losses)])
    options |= {"method": "val_gd", "n_steps": 20}
    for structure in ("scalar", "matrix"):
        before = nll(la, data, link)
        la.optimize_prior_precision(prior_structure=structure, **options)
        assert nll(la, data, link) <= before + rounding
    assert len(la.prior_precision) == LAYERS


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_the_cached_covariance_is_that_of_the_posterior(cls, kwargs):
    prior = torch.linspace(0.3, 3, LAYERS).double()
    la = exact_posterior(cls, prior_precision=prior, **kwargs)
    data = loader(8, lengths=(4, 6, 2), seed=7)
    groups = torch.arange(LAYERS) % 3
    for of, factors in ((groups, [0.3, 1.0, 7.0]), (groups * 0, [0.2])):
        la.prior_precision = prior
        factors = torch.tensor(factors).double()
        kind = CoupledCache if int(of.max()) else ValidationCache
        caches = [kind(Predictor(la.fitted), data, of, readout) for readout in (LOGITS, CONTRASTS)]
        la.prior_precision = prior * factors[of]
        moments = la._glm_predictive_distribution(next(iter(data)))
        tolerance = 1e-6 if len(factors) > 1 else 1e-5
        for cache, (mean, covariance) in zip(
            caches, (moments, contrasts_of(*moments)), strict=True
        ):
            assert_near(cache.mean, mean)
            assert_near(cache.covariance(factors), covariance, tolerance)


def test_a_failed_tuning_changes_nothing():
    la = exact_posterior(prior_precision=torch.linspace(1, 3, LAYERS))
    before = la(NEW_BATCH)
    with pytest.raises(ValueError, match="needs `val_loader`"):
        la.optimize_prior_precision(method="gridsearch")
    assert torch.equal(la(NEW_BATCH), before)
