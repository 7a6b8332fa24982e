"""FullLoraLaplace and LowRankLoraLaplace: the GGN posterior, without a matrix of all weights."""

import math

import pytest
import torch
from laplace import FullLaplace, Laplace, LowRankLaplace
from laplace.baselaplace import BaseLaplace
from laplace.laplace import _all_subclasses
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LogitsModel,
    LoraEF,
    LoraGGN,
    LowRankLoraLaplace,
)
from support.batches import LENGTHS, loader, token_batch
from support.exact_posteriors import BOTH, LAYERS, NEW_BATCH, exact_posterior
from support.models import peft_model
from support.references import assert_near, explicit_jacobians


def dense(la):
    return la.posterior_precision.to_matrix()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_curvature_is_the_ggn_of_explicit_jacobians(classes):
    la = exact_posterior(classes=classes, prior_precision=0.3, temperature=2.0)
    data = token_batch(LENGTHS, labels=classes)
    blocks = explicit_jacobians(la.model, data)
    J = torch.cat([block.flatten(2) for block in blocks], dim=-1).detach()
    p = la.model(data).softmax(-1).detach()
    hessian = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    ggn = torch.einsum("ncp,nck,nkq->pq", J, hessian, J)
    precision = ggn / 2.0 + 0.3 * torch.eye(la.n_params)
    assert_near(dense(la), precision)
    assert len(la.rows) == len(LENGTHS) * (classes - 1)
    rows = torch.cat([b.flatten(2) for b in explicit_jacobians(la.model, NEW_BATCH)], -1).detach()
    mean, covariance = la._glm_predictive_distribution(NEW_BATCH)
    assert_near(mean, la.model(NEW_BATCH).detach())
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
        list(ours._glm_predictive_distribution(NEW_BATCH)),
        list(theirs._glm_predictive_distribution(NEW_BATCH)),
    )
    assert_near(dense(ours), theirs.posterior_precision)
    assert_near(ours.posterior_covariance, theirs.posterior_covariance)
    assert_near(ours.posterior_scale @ ours.posterior_scale.T, theirs.posterior_covariance)
    assert_near(ours.weight_variance(), theirs.posterior_covariance.diagonal())
    vector = torch.randn(ours.n_params, dtype=torch.float64)
    assert_near(ours.square_norm(vector), theirs.square_norm(vector))
    assert_near(ours.log_prob(vector), theirs.log_prob(vector))
    if likelihood == "regression":
        assert_near(list(ours(NEW_BATCH, joint=True)), list(theirs(NEW_BATCH, joint=True)))


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_samples_have_the_posteriors_covariance(cls, kwargs):
    la = exact_posterior(cls, prior_precision=torch.linspace(0.5, 3, LAYERS), **kwargs)
    draws = la.sample(5000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draws, la.sample(5000, generator=torch.Generator().manual_seed(0)))
    assert_near(draws.mean(0), la.mean, 0.05)
    assert_near(draws.T.cov(), la.posterior_covariance, 0.3)
    # Along the best-determined direction, which a diagonal would miss:
    _, vectors = torch.linalg.eigh(la.posterior_covariance)
    assert_near((draws @ vectors[:, 0]).var(), 1 / torch.linalg.eigvalsh(dense(la))[-1], 0.08)
    mean, std = la.marginals()[la.params[3]]
    assert mean.shape == std.shape == la.params[3].shape
    nn = la(NEW_BATCH, pred_type="nn", link_approx="mc", n_samples=50)
    assert_near(nn.sum(-1), torch.ones(3).double())


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_by_name_and_nobody_elses_name(cls, kwargs):
    structure = cls._key[1]
    model = LogitsModel(peft_model("bert"))
    la = Laplace(model, "classification", "lora", structure, **kwargs)
    assert type(la) is cls
    la.fit(loader())
    assert_near(la(NEW_BATCH), exact_posterior(cls, **kwargs)(NEW_BATCH))
    by_key = {c._key: c for c in _all_subclasses(BaseLaplace) if hasattr(c, "_key")}
    assert by_key["all", "full"] is FullLaplace and by_key["all", "lowrank"] is LowRankLaplace


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_the_fit_does_not_depend_on_batches_and_padding(cls, kwargs):
    reference = exact_posterior(cls, **kwargs)
    for data in (loader(1), loader(7), loader(2, pad_to=11), loader(5, pad_to=9)):
        la = exact_posterior(cls, fit=False, **kwargs)
        la.fit(data)
        assert_near(la.log_marginal_likelihood(), reference.log_marginal_likelihood())
        assert_near(la(NEW_BATCH), reference(NEW_BATCH))


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_data_in_parts_and_merged_posteriors_equal_one_fit(cls, kwargs):
    whole = exact_posterior(cls, **kwargs)
    model, examples = peft_model("bert"), loader().dataset
    some = cls(model, "classification", **kwargs)
    for part in (examples[:2], examples[2:]):
        some.fit(DataLoader(part, batch_size=2), override=False)
    one, two = (cls(model, "classification", **kwargs) for _ in range(2))
    one.fit(DataLoader(examples[:3], batch_size=2))
    two.fit(DataLoader(examples[3:], batch_size=2))
    one(NEW_BATCH)
    one.merge([two])
    for la in (some, one):
        assert la.n_data == len(LENGTHS)
        assert_near(la.log_marginal_likelihood(), whole.log_marginal_likelihood())
        assert_near(la(NEW_BATCH), whole(NEW_BATCH))
    with pytest.raises(ValueError, match="same arguments"):
        other = {"row_dtype": "float32"} if cls is FullLoraLaplace else {"rank": 3}
        one.merge([exact_posterior(cls, **other)])


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_backends_modules_and_settings_change_the_posterior(cls, kwargs):
    reference = exact_posterior(cls, **kwargs)
    mean, covariance = reference._glm_predictive_distribution(NEW_BATCH)
    assert (
        abs(
            exact_posterior(cls, backend=LoraEF, **kwargs).log_marginal_likelihood()
            - reference.log_marginal_likelihood()
        )
        > 1e-3
    )
    part = exact_posterior(cls, modules="lora_A", **kwargs)
    assert {name.split(".")[-3] for name in part.block_names} == {"lora_A"}
    own = [i for i, name in enumerate(reference.block_names) if "lora_A" in name]
    if cls is FullLoraLaplace:
        assert_near(part.rows.tensors(), [reference.rows.matrix(i) for i in own])
    reference.covariance_scale, reference.likelihood_temperature = 3.0, 2.0
    assert_near(
        list(reference._glm_predictive_distribution(NEW_BATCH)), [mean / 2, covariance * 0.75]
    )


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
        gradients += torch.autograd.grad(la(x, link_approx="probit").square().sum(), x)
    assert gradients[0].any()
    assert_near(*gradients)


def test_the_error_falls_with_the_rank_and_truncation_says_how_much():
    exact = exact_posterior(prior_precision=0.05)
    _, covariance = exact._glm_predictive_distribution(NEW_BATCH)
    values = exact.posterior_precision.eigenvalues
    errors = []
    for rank in (1, 3, 6, 10, 14):
        la = exact_posterior(LowRankLoraLaplace, prior_precision=0.05, rank=rank)
        errors.append((la._glm_predictive_distribution(NEW_BATCH)[1] - covariance).norm().item())
        missed = 1 - (values[:rank].sum() / values.sum()).item()
        assert la.truncation == pytest.approx(missed, abs=0.03)
        assert len(la.rows) == rank
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-2
    assert errors[-1] < 1e-6 * covariance.norm() and la.truncation < 1e-9


def test_a_sketch_no_smaller_than_the_matrix_is_the_matrix():
    la = exact_posterior(LowRankLoraLaplace, rank=200)
    assert la.curvature.tensors()[0].shape == (la.n_params, la.n_params)
    assert_near(la(NEW_BATCH), exact_posterior()(NEW_BATCH))


def test_unknown_options_are_refused():
    for options, message in (
        ({"storage": "gpu"}, "storage must be one of"),
        ({"row_dtype": "float16"}, "row_dtype must be one of"),
        ({"row_dtype": "float64", "dtype": torch.float32}, "wider than the rows"),
    ):
        with pytest.raises(ValueError, match=message):
            exact_posterior(fit=False, **options)
    with pytest.raises(ValueError, match="rank must be positive"):
        exact_posterior(LowRankLoraLaplace, fit=False, rank=0)


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_moving_to_a_device_moves_everything(cls, kwargs):
    la = exact_posterior(cls, **kwargs)
    before = la(NEW_BATCH)
    assert la.to("cpu") is la
    assert_near(la(NEW_BATCH), before)
    la.to("meta")
    tensors = [value for value in vars(la).values() if isinstance(value, torch.Tensor)]
    tensors += [*la.model.parameters(), *la.rows.tensors()]
    tensors += la.curvature.tensors()
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert la.rows.device.type == "meta"


@pytest.mark.parametrize("cls,kwargs", BOTH)
def test_densities_have_gradients_by_prior_and_noise(cls, kwargs):
    model = LogitsModel(peft_model("bert", num_labels=3))
    theirs = FullLaplace(model, "regression", backend=LoraGGN, sigma_noise=0.6)
    ours = cls(model, "regression", sigma_noise=0.6, **kwargs)
    vector = torch.randn(ours.n_params, dtype=torch.float64)
    slopes = []
    for la in (ours, theirs):
        la.fit(loader(likelihood="regression"))
        la.sigma_noise = torch.tensor(0.6).double().requires_grad_()
        la.prior_precision = torch.tensor([2.0]).double().requires_grad_()
        variables = [la.prior_precision, la.sigma_noise]
        slopes.append(torch.autograd.grad(la.log_prob(vector).sum(), variables))
    assert_near(list(slopes[0]), list(slopes[1]), 1e-5)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace])
def test_what_are_no_jacobians_is_refused(cls):
    la = cls(peft_model("bert"), "classification")
    la.fit(loader())
    J = torch.randn(2, 3, la.n_params, dtype=torch.float64)
    for wrong in (J[..., 1:], J[0], J.numpy()):
        with pytest.raises(ValueError, match=r"Jacobians|unpack"):
            la.functional_variance(wrong)


def test_variances_without_gradients_by_the_prior_are_refused():
    """Those of rows have none, which would be missing in a sum without a word."""
    la = exact_posterior(enable_backprop=True)
    J = torch.randn(2, 3, la.n_params, dtype=torch.float64)
    expected = la.functional_variance(J)
    la.prior_precision = la.prior_precision.requires_grad_()
    for ask in (la.functional_variance, la.functional_covariance, lambda _: la(NEW_BATCH)):
        with pytest.raises(RuntimeError, match="have no gradients by prior precision and noise"):
            ask(J)
    with torch.no_grad():
        assert torch.equal(la.functional_variance(J), expected)
