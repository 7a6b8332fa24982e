"""FullLoraLaplace and LowRankLoraLaplace: the GGN posterior, without a matrix of all weights."""

import math

import pytest
import torch
from laplace import FullLaplace, Laplace, LowRankLaplace
from laplace.baselaplace import BaseLaplace
from laplace.laplace import _all_subclasses
from test_posterior import LENGTHS, loader
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    FullLoraLaplace,
    LogitsModel,
    LoraEF,
    LoraGGN,
    LowRankLoraLaplace,
)
from tiny import assert_near, explicit_jacobians, peft_model, token_batch

ENOUGH = {"rank": 25}  # directions for seven examples of up to three outputs
BOTH = [(FullLoraLaplace, {}), (LowRankLoraLaplace, ENOUGH)]
BATCH = token_batch((4, 2, 5), seed=3)
LAYERS = 10  # trainable tensors of the tiny BERT


def posterior(cls=FullLoraLaplace, likelihood="classification", classes=3, fit=True, **kwargs):
    dtype = kwargs.pop("dtype", torch.float64)
    la = cls(peft_model("bert", num_labels=classes, dtype=dtype), likelihood, **kwargs)
    if fit:
        la.fit(loader(likelihood=likelihood, labels=classes))
    return la


def dense(la):
    return la.posterior_precision.to_matrix()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_curvature_is_the_ggn_of_explicit_jacobians(classes):
    la = posterior(classes=classes, prior_precision=0.3, temperature=2.0)
    data = token_batch(LENGTHS, labels=classes)
    blocks = explicit_jacobians(la.model, data)
    J = torch.cat([block.flatten(2) for block in blocks], dim=-1).detach()
    p = la.model(data).softmax(-1).detach()
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    ggn = torch.einsum("ncp,nck,nkq->pq", J, hessian, J)
    precision = ggn / 2.0 + 0.3 * torch.eye(la.n_params)
    assert_near(dense(la), precision)
    assert len(la.rows) == len(LENGTHS) * (classes - 1)
    rows = torch.cat([b.flatten(2) for b in explicit_jacobians(la.model, BATCH)], -1).detach()
    mean, covariance = la._glm_predictive_distribution(BATCH)
    assert_near(mean, la.model(BATCH).detach())
    assert_near(covariance, rows @ precision.inverse() @ rows.mT)
    gap = la.mean
    evidence = -la.loss / 2.0 - 0.5 * (
        0.3 * gap @ gap + precision.logdet() - la.n_params * math.log(0.3)
    )
    assert_near(la.log_marginal_likelihood(), evidence)


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("likelihood,classes", [("classification", 2), ("regression", 3)])
@pytest.mark.parametrize("prior", ["scalar", "layerwise", "weights"])
def test_laplace_torchs_full_posterior(cls, kwargs, likelihood, classes, prior):
    model = LogitsModel(peft_model("bert", num_labels=classes))
    size = {"scalar": 1, "layerwise": LAYERS, "weights": None}[prior]
    size = size or sum(p.numel() for p in model.parameters() if p.requires_grad)
    options = {"prior_precision": torch.linspace(0.5, 3, size), "temperature": 0.7}
    if likelihood == "regression":
        options["sigma_noise"] = 0.6
    ours = cls(model, likelihood, **kwargs, **options)
    theirs = FullLaplace(model, likelihood, backend=LoraGGN, **options)
    for la in (ours, theirs):
        la.fit(loader(likelihood=likelihood, labels=classes))
    assert_near(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood().double())
    assert_near(
        list(ours._glm_predictive_distribution(BATCH)),
        list(theirs._glm_predictive_distribution(BATCH)),
    )
    assert_near(dense(ours), theirs.posterior_precision)
    assert_near(ours.posterior_covariance, theirs.posterior_covariance)
    assert_near(ours.weight_variance(), theirs.posterior_covariance.diagonal())
    vector = torch.randn(ours.n_params, dtype=torch.float64)
    assert_near(ours.square_norm(vector), theirs.square_norm(vector))
    assert_near(ours.log_prob(vector), theirs.log_prob(vector))
    if likelihood == "regression":
        assert_near(list(ours(BATCH, joint=True)), list(theirs(BATCH, joint=True)))


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("prior", [0.7, torch.linspace(0.1, 4, LAYERS)])
def test_covariance_times_precision_is_the_identity(cls, kwargs, prior):
    P = posterior(cls, prior_precision=prior, **kwargs).posterior_precision
    matrix, inverse = P.to_matrix(), P.to_matrix(-1)
    assert_near(matrix @ inverse, torch.eye(len(matrix)).double())
    assert_near(P.diag(), matrix.diagonal())
    assert_near(P.diag(-1), inverse.diagonal())
    root = P.root_multiply(torch.eye(len(matrix)).double())
    assert_near(root.T @ root, inverse)
    for query in (P.diag, P.to_matrix):
        with pytest.raises(ValueError, match="1 or -1"):
            query(2)


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_samples_have_the_posteriors_covariance(cls, kwargs):
    la = posterior(cls, prior_precision=torch.linspace(0.5, 3, LAYERS), **kwargs)
    draws = la.sample(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, la.sample(5000, generator=torch.Generator().manual_seed(0)))
    assert_near(draws.mean(0), la.mean, 0.05)
    assert_near(draws.T.cov(), la.posterior_covariance, 0.3)
    # Along the best-determined direction, which a diagonal would miss:
    _, vectors = torch.linalg.eigh(la.posterior_covariance)
    assert_near((draws @ vectors[:, 0]).var(), 1 / torch.linalg.eigvalsh(dense(la))[-1], 0.08)
    mean, std = la.marginals()[la.params[3]]
    assert mean.shape == std.shape == la.params[3].shape
    nn = la(BATCH, pred_type="nn", link_approx="mc", n_samples=50)
    assert_near(nn.sum(-1), torch.ones(3).double())


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_by_name_and_nobody_elses_name(cls, kwargs):
    structure = cls._key[1]
    model = LogitsModel(peft_model("bert"))
    la = Laplace(model, "classification", "lora", structure, **kwargs)
    assert type(la) is cls
    la.fit(loader())
    assert_near(la(BATCH), posterior(cls, **kwargs)(BATCH))
    by_key = {c._key: c for c in _all_subclasses(BaseLaplace) if hasattr(c, "_key")}
    assert by_key["all", "full"] is FullLaplace and by_key["all", "lowrank"] is LowRankLaplace


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kwargs):
    reference = posterior(cls, **kwargs)
    for data in (loader(1), loader(7), loader(2, pad_to=11), loader(5, pad_to=9)):
        la = posterior(cls, fit=False, **kwargs)
        la.fit(data)
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(BATCH), reference(BATCH))


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_data_in_parts_and_merged_posteriors_equal_one_fit(cls, kwargs):
    whole = posterior(cls, **kwargs)
    model, examples = peft_model("bert"), loader().dataset
    some = cls(model, "classification", **kwargs)
    for part in (examples[:2], examples[2:]):
        some.fit(DataLoader(part, batch_size=2), override=False)
    one, two = (cls(model, "classification", **kwargs) for _ in range(2))
    one.fit(DataLoader(examples[:3], batch_size=2))
    two.fit(DataLoader(examples[3:], batch_size=2))
    one(BATCH)
    one.merge([two])
    for la in (some, one):
        assert la.n_data == len(LENGTHS)
        assert_near(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
        assert_near(la(BATCH), whole(BATCH))
    with pytest.raises(ValueError, match="same arguments"):
        other = {"row_dtype": "float32"} if cls is FullLoraLaplace else {"rank": 3}
        one.merge([posterior(cls, **other)])


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_backends_modules_and_settings_change_the_posterior(cls, kwargs):
    reference = posterior(cls, **kwargs)
    mean, covariance = reference._glm_predictive_distribution(BATCH)
    assert (
        abs(
            posterior(cls, backend=LoraEF, **kwargs).log_marginal_likelihood()
            - reference.log_marginal_likelihood()
        )
        > 1e-3
    )
    part = posterior(cls, modules="lora_A", **kwargs)
    assert {name.split(".")[-3] for name in part.block_names} == {"lora_A"}
    own = [i for i, name in enumerate(reference.block_names) if "lora_A" in name]
    if cls is FullLoraLaplace:
        assert_near(part.rows.tensors(), [reference.rows.matrix(i) for i in own])
    reference.covariance_scale, reference.likelihood_temperature = 3.0, 2.0
    assert_near(list(reference._glm_predictive_distribution(BATCH)), [mean / 2, covariance * 0.75])


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("size", [1, LAYERS])
def test_evidence_is_differentiable_in_prior_and_noise(cls, kwargs, size):
    la = posterior(cls, "regression", **kwargs)
    prior = torch.linspace(0.4, 2, size).double().requires_grad_()
    noise = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(la.log_marginal_likelihood, (prior, noise))


def test_gradients_flow_through_the_predictive_on_request():
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)
    ).double()
    X, y = torch.randn(6, 3).double(), torch.arange(6) % 2
    data = DataLoader(TensorDataset(X, y), batch_size=3)
    x = X[:2].clone().requires_grad_()
    gradients = []
    for make, options in ((FullLoraLaplace, {}), (FullLaplace, {"backend": LoraGGN})):
        la = make(LogitsModel(net), "classification", enable_backprop=True, **options)
        la.fit(data)
        gradients += torch.autograd.grad(la(x).square().sum(), x)
    assert gradients[0].any()
    assert_near(*gradients)


# --- Low rank -------------------------------------------------------------------------------------


def test_the_error_falls_with_the_rank_and_truncation_says_how_much():
    exact = posterior(prior_precision=0.05)
    _, covariance = exact._glm_predictive_distribution(BATCH)
    values = exact.posterior_precision.eigenvalues
    errors = []
    for rank in (1, 3, 6, 10, 14):
        la = posterior(LowRankLoraLaplace, prior_precision=0.05, rank=rank)
        errors.append((la._glm_predictive_distribution(BATCH)[1] - covariance).norm().item())
        missed = 1 - (values[:rank].sum() / values.sum()).item()
        assert la.truncation == pytest.approx(missed, abs=0.03)
        assert len(la.rows) == rank
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2
    assert errors[-1] < 1e-6 * covariance.norm() and la.truncation < 1e-9


def test_a_sketch_no_smaller_than_the_matrix_is_the_matrix():
    la = posterior(LowRankLoraLaplace, rank=200)
    assert la.curvature.tensors()[0].shape == (la.n_params, la.n_params)
    assert_near(la(BATCH), posterior()(BATCH))


# --- Tuning ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls,kwargs", BOTH)
@pytest.mark.parametrize("structure", ["scalar", "matrix", "block", "layerwise"])
def test_the_evidence_is_at_its_maximum(cls, kwargs, structure):
    la = posterior(cls, "regression", prior_precision=torch.linspace(1, 3, LAYERS), **kwargs)
    noise_too = structure != "scalar"
    la.optimize_prior_precision(prior_structure=structure, tune_sigma_noise=noise_too)
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
        la.optimize_prior_precision()
        assert la.log_marginal_likelihood() < best
    else:
        la.optimize_prior_precision(tune_sigma_noise=True)
        assert la.log_marginal_likelihood() > best


def test_laplace_torchs_adam_on_request():
    la = posterior()
    la.optimize_prior_precision(prior_structure="layerwise")
    best = la.log_marginal_likelihood()
    la.optimize_prior_precision(prior_structure="layerwise", n_steps=3)
    assert la.log_marginal_likelihood() < best
    with pytest.raises(ValueError, match="prior_structure must be"):
        la.optimize_prior_precision(prior_structure="rows")


def nll(la, data):
    total = [
        torch.nn.functional.nll_loss(la(batch).log(), batch["labels"], reduction="sum")
        for batch in data
    ]
    return sum(total).item()


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_tuning_on_a_validation_set(cls, kwargs):
    data = loader(3, lengths=(4, 6, 2, 5, 3), seed=7)
    # From one precision a tensor: the grid's are scalars, a calibration keeps the proportions.
    la = posterior(cls, prior_precision=torch.linspace(1, 3, LAYERS), **kwargs)
    report = la.calibrate(data)
    assert report.nll_after <= report.nll_before
    assert nll(la, data) == pytest.approx(5 * report.nll_after, rel=1e-3)
    assert_near(la.prior_precision / la.prior_precision[0], torch.linspace(1, 3, LAYERS).double())
    la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=7)
    losses = {}
    for delta in torch.logspace(-4, 4, 7).tolist():
        other = posterior(cls, prior_precision=delta, **kwargs)
        losses[nll(other, data)] = delta
    assert la.prior_precision.item() == pytest.approx(losses[min(losses)])
    for structure in ("scalar", "matrix"):
        before = nll(la, data)
        options = {"method": "val_gd", "val_loader": data, "n_steps": 20}
        la.optimize_prior_precision(prior_structure=structure, **options)
        assert nll(la, data) <= before + 1e-6
    assert len(la.prior_precision) == LAYERS


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_the_cached_covariance_is_that_of_the_posterior(cls, kwargs):
    prior = torch.linspace(0.3, 3, LAYERS).double()
    la = posterior(cls, prior_precision=prior, **kwargs)
    data = loader(8, lengths=(4, 6, 2), seed=7)
    groups = torch.arange(LAYERS) % 3
    for of, factors in ((groups, [0.3, 1.0, 7.0]), (groups * 0, [0.2])):
        la.prior_precision = prior
        factors = torch.tensor(factors).double()
        cache = la.validation_cache(data, of, False)
        la.prior_precision = prior * factors[of]
        mean, covariance = la._glm_predictive_distribution(next(iter(data)))
        assert_near(cache.mean, mean)
        assert_near(cache.covariance(factors), covariance, 1e-6 if len(factors) > 1 else 2e-3)


def test_a_failed_tuning_changes_nothing():
    la = posterior(prior_precision=torch.linspace(1, 3, LAYERS))
    before = la(BATCH)
    with pytest.raises(ValueError, match="needs `val_loader`"):
        la.optimize_prior_precision(method="gridsearch")
    assert torch.equal(la(BATCH), before)
