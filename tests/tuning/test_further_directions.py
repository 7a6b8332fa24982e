"""Further directions of the gradient term's subspace, and when there are enough of them."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from laplace_lora.fitting import evidence_pass, further_directions
from laplace_lora.fitting.further_directions import asked_for
from laplace_lora.tuning.directions import orthonormal
from support.batches import loader
from support.language import language_posterior
from support.memorised import memorised
from support.posteriors import CLASSES, LOW, posterior
from support.references import assert_near
from support.subspaces import first, term_of
from support.sweeps import rest_slow


def exact_term(la, delta):
    """``½ bᵀ P⁻¹ b`` with the exact GGN of all weights, from the engine's rows."""
    la.model.eval()
    rows = []
    for batch in loader():
        x, y = la.fitted.split(batch)
        _, blocks = la.engine.root_blocks(x, y)
        rows.append(torch.cat([block.flatten(2) for block in blocks], dim=-1).flatten(0, 1))
    Z = torch.cat(rows)
    b = -la.state.loss_gradient - delta * (la.mean - la.prior_mean)
    return 0.5 * b @ torch.linalg.solve(Z.T @ Z + delta * torch.eye(len(b)).to(b), b)


@pytest.mark.parametrize(
    "cls,kwargs", [*CLASSES, (KronLoraLaplace, {"eigenvalue_correction": True})]
)
def test_enough_of_them_have_the_exact_term(cls, kwargs, monkeypatch):
    monkeypatch.setattr(evidence_pass, "STABLE", -1.0)
    monkeypatch.setattr(evidence_pass, "STEPS", 40)
    la = memorised(cls, **kwargs)
    la.measure_gradient_term()
    assert len(la.state.subspace.gradient) > 7
    delta = asked_for(la.fitted, la.state.subspace)
    found = term_of(la.state.subspace, delta)
    assert_near(found, exact_term(la, delta), 1e-6)


@pytest.mark.parametrize("limit,steps", [(-1.0, 3), (math.log(1.1), 2), (math.inf, 1)])
def test_they_are_taken_until_the_prior_changes_little(limit, steps, monkeypatch):
    """By a tenth; here priors are given, to see what follows from them."""
    asked = iter([100.0, 200.0, 190.0, 190.0])
    passes = []
    monkeypatch.setattr(evidence_pass, "asked_for", lambda posterior, subspace: next(asked))
    monkeypatch.setattr(evidence_pass, "STEPS", 3)
    original = evidence_pass.next_directions
    monkeypatch.setattr(
        evidence_pass, "next_directions", lambda *a: passes.append(1) or original(*a)
    )
    monkeypatch.setattr(further_directions, "SOLVED", 0.0)
    assert math.log(1.1) == evidence_pass.STABLE
    monkeypatch.setattr(evidence_pass, "STABLE", limit)
    la = posterior(**LOW)
    la.measure_gradient_term()
    assert len(passes) == steps
    assert 7 < len(la.state.subspace.gradient) <= 7 + 4 * steps  # some depend on others


@pytest.mark.parametrize("cls,kwargs", rest_slow(CLASSES, 0))
def test_the_prior_is_then_that_of_the_exact_term(cls, kwargs):
    la = posterior(cls, **kwargs)
    la.measure_gradient_term()
    delta = asked_for(la.fitted, la.state.subspace)
    logs = torch.linspace(-1, 1, 81).double()
    grid = [delta * math.exp(log) for log in logs.tolist()]
    plain = [la.log_marginal_likelihood(torch.tensor([value])) for value in grid]
    whole = [p + exact_term(la, value) for p, value in zip(plain, grid, strict=True)]
    best = max(range(len(grid)), key=lambda i: float(whole[i]))
    assert delta == pytest.approx(grid[best], rel=0.1)


@pytest.mark.filterwarnings("ignore:the observation noise is")  # the model is not fitted
@pytest.mark.parametrize("seed", range(4))
def test_a_linear_gaussian_model_has_its_true_evidence_with_kronecker_factors(seed, monkeypatch):
    """Of one output without a bias, Kronecker factors are the curvature itself."""
    monkeypatch.setattr(evidence_pass, "STABLE", -1.0)
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(30, 12, generator=generator).double()
    y = X[:, :1] + torch.randn(30, 1, generator=generator).double()
    net = nn.Linear(12, 1, bias=False).double()
    with torch.no_grad():  # any point to start from
        net.weight.copy_(5 * torch.randn(1, 12, generator=generator))
    la = KronLoraLaplace(net, "regression", sigma_noise=0.7, prior_mean=0.5)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=7))
    la.optimize_prior_precision(method="marglik")
    delta = float(la.prior_precision)
    covariance = X @ X.T / delta + 0.49 * torch.eye(30).double()
    # laplace-torch leaves no constant out
    true = torch.distributions.MultivariateNormal(0.5 * X.sum(1), covariance).log_prob(y[:, 0])
    assert_near(la.log_marginal_likelihood(correction=True), true, 1e-10)
    for factor in (0.9, 1.1):  # and its maximum
        covariance = X @ X.T / (factor * delta) + 0.49 * torch.eye(30).double()
        other = torch.distributions.MultivariateNormal(0.5 * X.sum(1), covariance)
        assert other.log_prob(y[:, 0]) < true


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
def test_labels_that_are_drawn_are_the_same_in_both_sweeps(cls, monkeypatch):
    """Else the remainder would not be one of a symmetric matrix, and the bound would not rise."""
    monkeypatch.setattr(evidence_pass, "STABLE", -1.0)
    monkeypatch.setattr(evidence_pass, "STEPS", 2)
    la = language_posterior(cls, "gpt2-lm")
    la.measure_gradient_term()
    subspace = la.state.subspace
    values = [float(term_of(first(subspace, m), 1.0)) for m in range(7, len(subspace.gradient) + 1)]
    assert len(values) > 1 and values == sorted(values)


def test_low_rank_posteriors_too(monkeypatch):
    monkeypatch.setattr(evidence_pass, "STABLE", -1.0)
    la = memorised(LowRankLoraLaplace, rank=3)
    la.measure_gradient_term()
    terms = [term_of(first(la.state.subspace, m), 1.0) for m in (7, 11)]
    assert terms[0] <= terms[1] <= exact_term(la, 1.0) * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_directions_that_depend_on_others_are_left_out(dtype):
    rows = torch.randn(4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.cat([rows, rows[:2] + rows[2:], 1e-9 * rows[:1], torch.zeros(1, 50)]).to(dtype)
    found = orthonormal(rows)
    assert found.shape == (4, 50)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_near(found @ found.T, torch.eye(4, dtype=dtype), tolerance)
    assert_near(rows @ found.T @ found, rows, tolerance)
    assert orthonormal(torch.zeros(3, 50, dtype=dtype)).shape == (1, 50)


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (LowRankLoraLaplace, {"rank": 4})])
def test_batches_do_not_change_the_evidence(cls, kwargs):
    values = []
    for batch_size in (1, 5, 12):
        la = posterior(cls, name="bert", fit=False, **kwargs)
        la.fit(loader(batch_size, lengths=(3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)))
        values.append(float(la.log_marginal_likelihood(correction=True)))
    assert values == pytest.approx(values[:1] * 3, rel=1e-7)
