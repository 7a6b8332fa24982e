"""The evidence: its definition, its gradients and its exact maxima."""

import math

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import DiagLoraLaplace, LogitsModel
from laplace_lora.tuning.groups import prior_groups
from support.batches import loader
from support.models import peft_model
from support.posteriors import CLASSES, DENSE, posterior
from support.references import assert_near

STRUCTURES = ("scalar", "layerwise", "matrix", "block")


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_evidence_equals_its_definition(cls, kwargs):
    la = posterior(cls, prior_precision=0.4, temperature=2.0, prior_mean=0.1, **kwargs)
    P = la.posterior_precision
    matrix = P.diag() if isinstance(P, torch.Tensor) else P.to_matrix()
    gap = la.mean - 0.1
    expected = (
        -la.loss / 2.0
        - 0.5 * 0.4 * gap @ gap
        - 0.5 * (matrix.logdet() - la.n_params * math.log(0.4))
    )
    assert_near(la.log_marginal_likelihood(), expected)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_evidence_is_differentiable_in_prior_and_noise(cls, kwargs):
    la = cls(peft_model("bert"), "regression", **kwargs)
    la.fit(loader(likelihood="regression"))
    prior = torch.full((la.n_layers,), 0.7, dtype=torch.float64, requires_grad=True)
    noise = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, noise))


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("structure", ["scalar", "layerwise"])
def test_the_marginal_likelihood_tunes_the_prior(cls, kwargs, structure):
    la = posterior(cls, **kwargs)
    before = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(prior_structure=structure, n_steps=200)
    assert len(la.prior_precision) == (1 if structure == "scalar" else la.n_layers)
    assert not la.prior_precision.requires_grad
    after = la.log_marginal_likelihood()
    assert after > before
    for factor in (0.8, 1.25):
        assert la.log_marginal_likelihood(la.prior_precision * factor) < after
        la.prior_precision = la.prior_precision / factor


def test_the_evidence_does_not_drown_in_directions_without_data():
    """In single precision log det P − log det P₀ would cancel; summed as log1p it does not."""
    double = posterior(**DENSE, prior_precision=1e4)
    single = posterior(**DENSE, prior_precision=1e4, dtype=torch.float32)
    assert single.log_det_ratio.item() == pytest.approx(double.log_det_ratio.item(), rel=1e-3)
    assert 0 < single.log_det_ratio.item() < 1


def evidence_at(la, log_prior):
    return la.log_marginal_likelihood(log_prior.exp())


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_is_at_its_maximum(cls, kwargs, structure):
    la = posterior(cls, **kwargs)
    la.optimize_prior_precision(prior_structure=structure, correction=False)
    groups = prior_groups(la.block_names, structure)
    assert len(la.prior_precision) == (1 if structure == "scalar" else la.n_layers)
    log_prior = la.prior_precision.log().requires_grad_()
    (gradient,) = torch.autograd.grad(evidence_at(la, log_prior), log_prior)
    by_group = torch.zeros(int(groups.max()) + 1).double()
    by_group.index_add_(0, groups[: len(gradient)], gradient)
    assert by_group.abs().max() < 1e-6


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_evidence_gradients_against_finite_differences(cls, kwargs):
    la = posterior(cls, **kwargs)
    log_prior = torch.linspace(-1, 1, la.n_layers).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: evidence_at(la, x), log_prior)


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_finer_groups_never_lower_the_evidence(cls, kwargs):
    la = posterior(cls, **kwargs)
    evidence = {}
    for structure in STRUCTURES:
        la.optimize_prior_precision(prior_structure=structure, correction=False)
        evidence[structure] = la.log_marginal_likelihood().item()
    assert evidence["scalar"] <= min(evidence["matrix"], evidence["block"]) + 1e-9
    assert max(evidence["matrix"], evidence["block"]) <= evidence["layerwise"] + 1e-9


def test_laplace_torchs_adam_is_there_on_request_and_not_better():
    la = posterior(**DENSE)
    la.optimize_prior_precision(correction=False)
    exact = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(n_steps=2, lr=0.1)
    few = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(n_steps=300, lr=0.1)
    assert few < la.log_marginal_likelihood().item() <= exact + 1e-6


def test_a_diagonal_prior_belongs_to_a_diagonal_posterior():
    la = posterior(DiagLoraLaplace)
    la.optimize_prior_precision(prior_structure="diag", n_steps=3)
    assert len(la.prior_precision) == la.n_params
    with pytest.raises(ValueError, match=r"per-layer: one .* DiagLoraLaplace can"):
        posterior(**DENSE).optimize_prior_precision(prior_structure="diag")


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_noise_of_a_regression_is_recovered(cls, kwargs):
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1).double()
    X = torch.randn(2000, 3).double()
    with torch.no_grad():
        y = net(X) + 0.3 * torch.randn(2000, 1).double()
        ridge = torch.linalg.lstsq(torch.cat([X, torch.ones(2000, 1).double()], 1), y).solution
        net.weight.copy_(ridge[:3].T)
        net.bias.copy_(ridge[3])
    la = cls(LogitsModel(net), "regression", **kwargs)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=500))
    la.optimize_prior_precision(tune_sigma_noise=True, prior_structure="layerwise")
    assert la.sigma_noise.item() == pytest.approx(0.3, rel=0.05)
    noise = la.sigma_noise.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(la.log_marginal_likelihood(sigma_noise=noise), noise)[0]
    assert abs(gradient.item()) < 1e-2
    with pytest.raises(ValueError, match="observation noise"):
        posterior(**DENSE).optimize_prior_precision(tune_sigma_noise=True)
