"""The evidence at weights that are no mode of the prior."""

import itertools
import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    LoraEF,
    LowRankLoraLaplace,
)
from laplace_lora.tuning.evidence import corrected as corrected_evidence
from laplace_lora.tuning.evidence.corrected import uphill
from laplace_lora.tuning.evidence.curves import CoupledEvidence
from laplace_lora.tuning.groups import prior_groups
from support.batches import loader
from support.models import peft_model
from support.posteriors import CLASSES, LOW, posterior
from support.references import assert_near
from support.subspaces import first, term_of

EXACT = [(FullLoraLaplace, {}), (LowRankLoraLaplace, {"rank": 30})]
ALL = [*CLASSES, (KronLoraLaplace, {"eigenvalue_correction": True}), *EXACT]


def linear_regression(seed, features=3, examples=12):
    torch.manual_seed(seed)
    net = nn.Linear(features, 1).double()
    X = torch.randn(examples, features).double()
    y = X.sum(1, keepdim=True) + 0.5 * torch.randn(examples, 1).double()
    return net, X, y, DataLoader(TensorDataset(X, y), batch_size=5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("noise", [0.25, 2.0])
@pytest.mark.parametrize("delta", [0.25, 1.0, 32.0])
def test_a_linear_gaussian_model_has_its_true_evidence_wherever_it_stands(seed, noise, delta):
    net, X, y, data = linear_regression(seed)
    settings = {"prior_precision": delta, "sigma_noise": noise, "prior_mean": 0.5}
    la = FullLoraLaplace(net, "regression", **settings)
    la.fit(data)
    design = torch.cat([X, torch.ones(len(X), 1).double()], 1)
    mean = design @ torch.full((design.shape[1],), 0.5).double()
    covariance = design @ design.T / delta + noise**2 * torch.eye(len(X)).double()
    # laplace-torch leaves no constant out
    true = MultivariateNormal(mean, covariance).log_prob(y.squeeze(1))
    assert_near(la.log_marginal_likelihood(correction=True).double(), true, 1e-9)


UNIT = 1e4  # of targets in tens of thousands


def large_regression():
    """A linear model with targets and weights in tens of thousands, and one feature that is, too.

    As of a head and the adapter below it: that feature's own weight has the size of one.
    """
    net, X, y, _ = linear_regression(0)
    X[:, 0] *= UNIT
    y = UNIT * y
    with torch.no_grad():
        net.weight[:, 1:] *= UNIT
        net.bias *= UNIT
    return net, torch.cat([X, torch.ones(len(X), 1).double()], 1), y[:, 0], X


@pytest.mark.parametrize("cls,kwargs", [*ALL, (FullLoraLLLaplace, {})])
@pytest.mark.parametrize("structure", ["scalar", "matrix"])
def test_strong_priors_on_large_weights_have_their_true_evidence(cls, kwargs, structure):
    """Its gradient term and what the prior charges were 10¹⁸ nats each there."""
    net, design, y, X = large_regression()
    model = nn.Sequential(nn.Identity(), net) if cls is FullLoraLLLaplace else net
    la = cls(model, "regression", sigma_noise=0.5 * UNIT, **kwargs)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=5))
    count = 1 if structure == "scalar" or la.structure.scalar_only else 2
    for delta in (1e-8, 1e-2, 1e4, 1e10):
        each = torch.tensor([delta, 3 * delta][:count]).double()
        covariance = (design / each.expand(2).repeat_interleave(torch.tensor([3, 1]))) @ design.T
        noise = (0.5 * UNIT) ** 2 * torch.eye(len(y)).double()
        value = MultivariateNormal(torch.zeros_like(y), covariance + noise).log_prob(y)
        value += 0.5 * torch.logdet(torch.eye(len(y)) + covariance / (0.5 * UNIT) ** 2)
        found = la.log_marginal_likelihood(each, correction=True) + 0.5 * la.log_det_ratio
        assert_near(found, value, 1e-8)  # the determinant is the structure's own


@pytest.mark.parametrize("structure", ["scalar", "matrix"])
@pytest.mark.parametrize("cls,kwargs", [*EXACT, (KronLoraLaplace, {})])
def test_a_prior_on_large_weights_is_tuned_by_the_evidence(cls, kwargs, structure):
    net, _, y, X = large_regression()
    la = cls(net, "regression", sigma_noise=0.5 * UNIT, **kwargs)
    la.fit(DataLoader(TensorDataset(X, y), batch_size=5))
    la.optimize_prior_precision(method="marglik", prior_structure=structure)
    chosen, best = la.prior_precision, la.log_marginal_likelihood(correction=True)
    for log_delta in range(-6, 11):
        for other in (torch.tensor([10.0**log_delta]).double(), chosen * 10 ** (log_delta / 10)):
            assert la.log_marginal_likelihood(other, correction=True) < best + 1e-3


@pytest.mark.filterwarnings("ignore:the observation noise is")  # the model is not fitted
@pytest.mark.parametrize("structure", ["scalar", "matrix"])
@pytest.mark.parametrize("cls,kwargs", [*EXACT, (KronLoraLaplace, {})])
def test_the_unit_of_the_targets_does_not_matter(cls, kwargs, structure):
    found = []
    for unit in (1.0, 1e-5, 1e5):
        net, X, y, _ = linear_regression(0)
        with torch.no_grad():
            net.weight *= unit
            net.bias *= unit
        la = cls(net, "regression", sigma_noise=unit, **kwargs)
        la.fit(DataLoader(TensorDataset(X, unit * y), batch_size=5))
        options = {"tune_sigma_noise": True, "prior_structure": structure}
        la.optimize_prior_precision(method="marglik", **options)
        found.append(torch.cat([la.prior_precision * unit**2, la.sigma_noise.reshape(1) / unit]))
    for other in found[1:]:
        assert_near(other, found[0], 1e-3)


def test_a_prior_without_a_corrected_evidence_is_not_left_in_place():
    la = posterior(DiagLoraLaplace)
    before, value = la.prior_precision, la.log_marginal_likelihood()
    each = torch.full((la.n_params,), 2.0).double()
    with pytest.raises(ValueError, match="one prior precision in all or per tensor"):
        la.log_marginal_likelihood(each, correction=True, train_loader=loader())
    assert torch.equal(la.prior_precision, before)
    assert la.log_marginal_likelihood() == value
    la.log_marginal_likelihood(2 * before)
    assert torch.equal(la.prior_precision, 2 * before)


def full_term(la, delta):
    """``½ bᵀ P⁻¹ b`` with the exact GGN of all weights."""
    rows = FullLoraLaplace(la.logits_model, "classification")
    rows.fit(loader(), evidence_correction=False)
    Z = torch.cat(rows.curvature.tensors(), dim=1)
    b = -la.state.loss_gradient - delta * (la.mean - la.prior_mean)
    P = Z.T @ Z + delta * torch.eye(len(b)).double()
    return 0.5 * b @ torch.linalg.solve(P, b)


@pytest.mark.parametrize("cls,kwargs", ALL)
def test_the_term_is_a_lower_bound_of_the_exact_one(cls, kwargs):
    la = cls(peft_model("bert"), "classification", **kwargs)
    la.fit(loader())
    la.measure_gradient_term()
    for delta in (0.1, 1.0, 50.0):
        exact = full_term(la, delta)
        charge = 0.5 * delta * la.state.squared_norms.sum()
        found = la.fitted.gradient_term.rise(torch.tensor([delta]), 1.0) + charge
        assert 0.5 * exact < found <= exact * (1 + 1e-7)


@pytest.mark.parametrize("delta", [1e-2, 1.0, 100.0])
def test_exact_posteriors_have_the_term_itself_in_closed_form(delta, tmp_path):
    la = FullLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    plain = la.log_marginal_likelihood(torch.tensor([delta]))
    found = la.log_marginal_likelihood(torch.tensor([delta]), correction=True)
    assert la.state.subspace is None  # no pass over the data was needed
    assert_near(found - plain, full_term(la, delta), 1e-7)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = FullLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert torch.equal(loaded.log_marginal_likelihood(correction=True), found)


def test_the_closed_form_with_a_precision_per_tensor():
    la = FullLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    prior = torch.rand(la.n_layers, generator=torch.Generator().manual_seed(0)).double() + 0.1
    la.prior_precision = prior
    P = la.posterior_precision.to_matrix().double()
    weights = torch.cat([v.expand(n) for v, n in zip(prior, la.engine.sizes, strict=True)])
    b = -la.state.loss_gradient - weights * la.mean
    expected = 0.5 * b @ torch.linalg.solve(P, b) - 0.5 * weights @ la.mean.square()
    term = la.fitted.gradient_term
    assert_near(term.rise(prior, 1.0), expected, 1e-9)
    same = torch.full((la.n_layers,), 3.0, dtype=torch.float64)
    assert_near(term.rise(same, 2.0), term.rise(same[:1], 2.0), 1e-9)
    variable = prior.clone().requires_grad_()
    torch.autograd.gradcheck(lambda value: term.rise(value, 1.0), variable)
    one = prior[:1].clone().requires_grad_()
    torch.autograd.gradcheck(lambda value: term.rise(value, 1.0), one)


@pytest.mark.parametrize(
    "kwargs", [{"backend": LoraEF}, {"backend_kwargs": {"stochastic": True, "num_samples": 1}}]
)
def test_rows_that_do_not_see_the_gradient_are_not_inverted(kwargs):
    la = FullLoraLaplace(peft_model("bert"), "classification", **kwargs)
    torch.manual_seed(0)
    la.fit(loader())
    sees = "backend" in kwargs  # the empirical Fisher's rows are the examples' gradients
    assert (la.fitted.gradient_term is not None) == sees
    la.measure_gradient_term()
    assert (la.state.subspace is None) == sees


def nearly_fitted(model, noise=0.1):
    """Texts whose targets are the model's own outputs with a little noise."""
    rows = loader(likelihood="regression").dataset
    la = KronLoraLaplace(model, "regression")
    for row in rows:
        outputs = la.logits_model({k: v[None] for k, v in row.items() if k != "labels"})
        row["labels"] = outputs[0].detach() + noise * row["labels"]
    return DataLoader(rows, batch_size=3)


@pytest.mark.filterwarnings("ignore:the posterior predicts its training examples worse")
@pytest.mark.parametrize("kwargs", [{"backend": LoraEF}, {"backend_kwargs": {"stochastic": True}}])
@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
def test_noise_stays_where_the_curvature_is_an_estimate(cls, kwargs):
    torch.manual_seed(0)
    model = peft_model("bert").eval()
    data = nearly_fitted(model)
    la = cls(model, "regression", **kwargs)
    la.fit(data)
    la.optimize_prior_precision(method="marglik", tune_sigma_noise=True)
    assert 0.05 < la.sigma_noise < 0.2
    assert la.log_marginal_likelihood(correction=True) < 100


def test_further_directions_tighten_the_bound():
    la = posterior(**LOW)
    la.measure_gradient_term()
    whole = la.state.subspace
    assert len(whole.gradient) > 7  # those of the guide, and one step at least
    for delta in (0.1, 1.0, 50.0):
        values = []
        for m in range(1, len(whole.gradient) + 1):
            values.append(term_of(first(whole, m), delta).item())
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
        assert values[-1] > values[0]


def test_at_a_mode_it_vanishes():
    net, X, y, data = linear_regression(0)
    design = torch.cat([X, torch.ones(len(X), 1).double()], 1)
    mode = torch.linalg.solve(design.T @ design + 2 * torch.eye(4).double(), design.T @ y)[:, 0]
    with torch.no_grad():
        net.weight.copy_(mode[:3].unsqueeze(0))
        net.bias.copy_(mode[3:])
    la = KronLoraLaplace(net, "regression", prior_precision=2.0)
    la.fit(data)
    difference = la.log_marginal_likelihood(correction=True) - la.log_marginal_likelihood()
    assert abs(difference.item()) < 1e-12


@pytest.mark.parametrize("cls,kwargs", ALL)
@pytest.mark.parametrize("structure", ["scalar", "matrix"])
def test_tuning_ends_at_a_maximum_and_wins(cls, kwargs, structure):
    la = posterior(cls, **kwargs)
    la.optimize_prior_precision(prior_structure=structure, correction=False)
    plain = la.log_marginal_likelihood(correction=True)
    la.optimize_prior_precision(method="marglik", prior_structure=structure)
    best, prior = la.log_marginal_likelihood(correction=True), la.prior_precision.clone()
    assert best >= plain - 1e-9
    for factor in (0.97, 1.03):
        la.prior_precision = prior * factor
        assert la.log_marginal_likelihood(correction=True) <= best + 0.01


@pytest.mark.parametrize("cls,kwargs", ALL)
@pytest.mark.parametrize("structure", ["scalar", "matrix"])
def test_noise_and_groups_are_at_a_maximum_of_the_whole_evidence(cls, kwargs, structure):
    la = cls(peft_model("bert", num_labels=3), "regression", **kwargs)
    la.fit(loader(likelihood="regression"))
    la.optimize_prior_precision(
        method="marglik", prior_structure=structure, tune_sigma_noise=True, correction=True
    )
    logs = torch.cat([la.prior_precision.detach(), la.sigma_noise.detach().reshape(1)]).log()
    inside = (logs[:-1] > math.log(2e-6)) & (logs[:-1] < math.log(5e9))
    groups = prior_groups(la.fitted.names, structure)

    def evidence(logs):
        return la.log_marginal_likelihood(logs[:-1].exp(), logs[-1].exp(), correction=True)

    best = evidence(logs) + 2e-5  # of about 30, from a model in float32
    for step in (0.05, -0.05):
        assert evidence(logs + step * (torch.arange(len(logs)) == len(logs) - 1)) <= best
        for group in groups.unique() if len(inside) > 1 else [0]:
            mine = groups == group if len(inside) > 1 else torch.ones(1, dtype=torch.bool)
            if bool((inside & mine).any()):
                moved = logs.clone()
                moved[:-1] += step * mine
                assert evidence(moved) <= best


@pytest.mark.parametrize("cls,kwargs", EXACT)
def test_coupled_groups_have_the_evidence_of_the_term(cls, kwargs):
    la = posterior(cls, **kwargs)
    groups = prior_groups(la.fitted.names, "matrix")
    la.measure_gradient_term()
    curve = CoupledEvidence(la.fitted, groups)
    for logs in (torch.tensor([0.3, 1.1, -0.4]), torch.tensor([2.0, -1.0, 0.5])):
        precisions = logs.double().exp()[: int(groups.max()) + 1][groups]
        expected = la.log_marginal_likelihood(precisions, correction=True)
        assert_near(curve(logs.double()[: int(groups.max()) + 1], torch.zeros(())), expected, 1e-6)


def test_it_is_measured_when_an_evidence_is_first_asked_for():
    la = posterior(**LOW)
    assert la.state.subspace is None
    la.optimize_prior_precision()
    la.optimize_prior_precision(method="marglik", correction=False)
    assert la.state.subspace is None
    la.log_marginal_likelihood(correction=True)
    measured = la.state.subspace
    assert measured is not None
    la.optimize_prior_precision(method="marglik")
    assert la.state.subspace is measured
    early = posterior(fit=False, **LOW)
    early.fit(loader(), evidence_correction=True)
    assert_near(early.state.subspace.curvature, measured.curvature, 1e-9)


def test_another_prior_mean_is_measured_anew():
    la = posterior(**LOW)
    expected = la.log_marginal_likelihood(correction=True)
    la.prior_mean = 0.1
    other = la.log_marginal_likelihood(correction=True)
    assert abs(other - expected) > 1e-3
    la.prior_mean = 0.0
    assert_near(la.log_marginal_likelihood(correction=True), expected, 1e-9)


def test_a_fit_that_leaves_it_out_is_tuned_without_it():
    la = posterior(fit=False, **LOW)
    la.fit(loader(), evidence_correction=False)
    la.optimize_prior_precision(method="marglik")
    assert la.state.subspace is None
    plain = la.prior_precision.clone()
    la.optimize_prior_precision(method="marglik", correction=True)
    assert not torch.equal(la.prior_precision, plain)


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), EXACT[0], EXACT[1]])
def test_data_that_are_added_or_merged_count(cls, kwargs):
    whole = posterior(cls, **kwargs, fit=False)
    batches = list(loader())
    twice = Batches([*batches, *batches], list(loader().dataset) * 2)
    whole.fit(twice)
    expected = whole.log_marginal_likelihood(correction=True)
    added = posterior(cls, **kwargs)
    added.log_marginal_likelihood(correction=True)
    added.fit(loader(), override=False)
    assert_near(added.log_marginal_likelihood(correction=True), expected, 1e-6)
    merged = posterior(cls, **kwargs)
    merged.merge([posterior(cls, **kwargs)])
    assert_near(merged.log_marginal_likelihood(correction=True), expected, 1e-6)


class Batches(list):
    """Batches that are there already, as a loader."""

    def __init__(self, batches, dataset):
        super().__init__(batches)
        self.dataset = dataset


def test_without_the_data_it_says_what_it_needs(tmp_path):
    la = posterior(name="bert", **LOW)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(ValueError, match="give `train_loader`"):
        loaded.log_marginal_likelihood(correction=True)
    with pytest.raises(ValueError, match="give `train_loader`"):
        loaded.optimize_prior_precision(method="marglik", correction=True)
    with pytest.warns(UserWarning, match="give `train_loader`"):
        loaded.optimize_prior_precision(method="marglik")
    with pytest.raises(ValueError, match="gives 3 examples, the fit saw 7"):
        loaded.measure_gradient_term(loader(lengths=(3, 6, 4)))
    loaded.prior_precision = 1.0
    value = loaded.log_marginal_likelihood(correction=True, train_loader=loader())
    assert_near(value, la.log_marginal_likelihood(correction=True), 1e-9)
    loaded.optimize_prior_precision(method="marglik")
    adopted = posterior(name="bert", **LOW)
    adopted.adopt(la.curvature, 7, loader())
    with pytest.raises(ValueError, match="give `train_loader`"):
        adopted.log_marginal_likelihood(correction=True)
    found = adopted.log_marginal_likelihood(correction=True, train_loader=loader())
    assert_near(found, value, 1e-5)  # a gradient summed up anew: other remainders


def test_an_evidence_above_zero_is_refused():
    la = FullLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    la.state = replace(la.state, loss_gradient=30 * la.state.loss_gradient)
    with pytest.raises(FloatingPointError, match="quadratic expansion does not hold"):
        la.log_marginal_likelihood(torch.tensor([1e-4]), correction=True)
    net, _, _, data = linear_regression(0)
    regression = FullLoraLaplace(net, "regression", prior_precision=1.0, sigma_noise=1e-3)
    regression.fit(data)
    regression.log_marginal_likelihood(correction=True)  # densities may be above one


def test_files_and_dictionaries_keep_it(tmp_path):
    la = KronLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    la.measure_gradient_term()
    la.save_pretrained(tmp_path, precision="exact")
    loaded = KronLoraLaplace.from_pretrained(peft_model("bert"), tmp_path)
    again = KronLoraLaplace(peft_model("bert"), "classification")
    again.load_state_dict(la.state_dict())
    for other in (loaded, again):
        assert torch.equal(
            other.log_marginal_likelihood(correction=True),
            la.log_marginal_likelihood(correction=True),
        )


def test_a_loader_that_runs_out_leaves_it_out():
    class Once:
        def __init__(self, data):
            self.batches, self.dataset = iter(data), data.dataset

        def __iter__(self):
            return self.batches

    la = DiagLoraLaplace(peft_model("bert"), "classification")
    with pytest.warns(UserWarning, match="is not measured: the training loader is empty"):
        la.fit(Once(loader()), evidence_correction=True)
    with pytest.warns(UserWarning, match="without a part of the evidence.* is empty"):
        la.optimize_prior_precision(method="marglik")
    assert math.isfinite(float(la.prior_precision))


@pytest.mark.parametrize("structure", ["scalar", "matrix"])
def test_an_evidence_without_a_credible_maximum_says_so(structure):
    la = FullLoraLaplace(peft_model("llama"), "classification")
    la.fit(loader(batch_size=8, lengths=(4, 6, 2, 5, 3, 6, 1, 4) * 4, seed=1))
    with pytest.warns(UserWarning, match="no maximum where it is credible.*The border is taken"):
        la.optimize_prior_precision(method="marglik", prior_structure=structure)
    assert la.log_marginal_likelihood(correction=True) <= 0


def test_noise_is_not_sought_where_rounding_is_all_there_is(monkeypatch):
    """In float32 a regression's evidence rose by a million nats on the way to no noise at all."""
    net, X, y, _ = linear_regression(0)
    la = FullLoraLaplace(net.float(), "regression")
    la.fit(DataLoader(TensorDataset(X.float(), y.float()), batch_size=5))

    def rising(evidence, start, log_noise, bound, tune_noise, *limits):
        return uphill(lambda _, log_sigma: -log_sigma, start, log_noise, bound, True, *limits)

    monkeypatch.setattr(corrected_evidence, "uphill", rising)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        la.optimize_prior_precision(tune_sigma_noise=True)
    rounding = la.fitted.state.loss * torch.finfo(torch.float32).eps / float(la.sigma_noise) ** 2
    assert float(rounding) == pytest.approx(corrected_evidence.PLATEAU, rel=1e-3)
