"""Tuning: exact maxima of the evidence, one pass over a validation set, calibration."""

import pytest
import torch
from laplace import KronLaplace
from laplace.utils.metrics import RunningNLLMetric
from test_posterior import CLASSES, DENSE, LOW, loader, posterior
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.tuning.groups import prior_groups
from laplace_lora.tuning.validation_cache import Scoring, ValidationCache
from tiny import assert_near, peft_model, token_batch

STRUCTURES = ("scalar", "layerwise", "matrix", "block")


def validation(batch_size=3):
    return loader(batch_size, lengths=(4, 6, 2, 5, 3, 6, 1, 4), seed=7)


def evidence_at(la, log_prior):
    return la.log_marginal_likelihood(log_prior.exp())


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_evidence_is_at_its_maximum(cls, kwargs, structure):
    la = posterior(cls, **kwargs)
    la.optimize_prior_precision(prior_structure=structure)
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
        la.optimize_prior_precision(prior_structure=structure)
        evidence[structure] = la.log_marginal_likelihood().item()
    assert evidence["scalar"] <= min(evidence["matrix"], evidence["block"]) + 1e-9
    assert max(evidence["matrix"], evidence["block"]) <= evidence["layerwise"] + 1e-9


def test_laplace_torchs_adam_is_there_on_request_and_not_better():
    la = posterior(**DENSE)
    la.optimize_prior_precision()
    exact = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(n_steps=2, lr=0.1)
    few = la.log_marginal_likelihood().item()
    la.optimize_prior_precision(n_steps=300, lr=0.1)
    assert few < la.log_marginal_likelihood().item() <= exact + 1e-6


def test_groups_by_matrix_by_block_and_by_function():
    names = [
        "model.layers.0.q.lora_A.default.weight",
        "model.layers.0.q.lora_B.default.weight",
        "model.layers.11.q.lora_A.default.weight",
        "score.weight",
    ]
    assert prior_groups(names, "matrix").tolist() == [0, 1, 0, 2]
    assert prior_groups(names, "block").tolist() == [0, 0, 1, 2]
    assert prior_groups(names, "layerwise").tolist() == [0, 1, 2, 3]
    assert prior_groups(names, lambda name: "score" in name).tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="prior_structure must be one of"):
        prior_groups(names, "rows")


def test_a_diagonal_prior_belongs_to_a_diagonal_posterior():
    la = posterior(DiagLoraLaplace)
    la.optimize_prior_precision(prior_structure="diag", n_steps=3)
    assert len(la.prior_precision) == la.n_params
    with pytest.raises(ValueError, match="scalar or per-layer"):
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


@pytest.mark.parametrize("cls,kwargs", CLASSES)
@pytest.mark.parametrize("link", ["probit", "bridge"])
def test_one_pass_grid_equals_laplace_torchs_loop(cls, kwargs, link):
    la = posterior(cls, **kwargs)
    grid = torch.logspace(-3, 3, 13)
    from laplace_lora.tuning.validation_search import grid_search

    best, losses = grid_search(la, validation(), grid, Scoring.of(la, link, 1), None, False)
    expected = []
    for value in grid:
        la.prior_precision = value.item()
        metric = RunningNLLMetric()
        for batch in validation():
            metric.update(la(batch, link_approx=link), batch["labels"])
        expected.append(metric.compute().double())
    assert_near(losses, torch.stack(expected), 1e-6)
    assert best == pytest.approx(grid[torch.stack(expected).argmin()].item())


def test_one_pass_grid_equals_laplace_torchs_own_search():
    ours = posterior(**DENSE)
    theirs = KronLaplace(ours.model, "classification", backend=LoraGGN)
    theirs.fit(loader())
    options = {"val_loader": validation(), "grid_size": 11}
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


def test_losses_stay_finite_where_probabilities_underflow():
    la = posterior(dtype=torch.float32, prior_precision=1e6, **DENSE)
    original = la.model.forward
    la.model.forward = lambda batch: original(batch) * 1e4
    from laplace_lora.tuning.validation_search import grid_search

    grid = torch.logspace(5, 8, 3)
    _, losses = grid_search(la, validation(), grid, Scoring.of(la, "probit", 1), None, False)
    assert losses.isfinite().all()


def test_regressions_are_searched_by_their_likelihood():
    la = KronLoraLaplace(peft_model("bert"), "regression", **DENSE)
    la.fit(loader(likelihood="regression"))
    data = loader(likelihood="regression", seed=7)
    la.optimize_prior_precision(method="gridsearch", val_loader=data, grid_size=9)
    assert 1e-4 < la.prior_precision.item() <= 1e4
    la.optimize_prior_precision(method="val_gd", val_loader=data, n_steps=3)
    with pytest.raises(ValueError, match="needs a classifier"):
        la.calibrate(data)


def validation_nll(la, link="probit"):
    total, count = 0.0, 0
    for batch in validation(8):
        p = la(batch, link_approx=link, generator=torch.Generator().manual_seed(0))
        total -= p[range(len(p)), batch["labels"]].log().sum().item()
        count += len(p)
    return total / count


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
    cache = ValidationCache(la, validation(8), groups)
    factors = torch.tensor([0.3, 7.0]).double()
    la.prior_precision = prior * factors[groups]
    (batch,) = validation(8)
    mean, covariance = la._glm_predictive_distribution(batch)
    assert_near(cache.mean, mean)
    assert_near(cache.covariance(factors), covariance, 2e-3)


@pytest.mark.parametrize(
    "cls,kwargs,link,width",
    [
        *((KronLoraLaplace, LOW, link, w) for link in ("probit", "mc") for w in (0.1, 1.0, 10.0)),
        (DiagLoraLaplace, {}, "probit", 10.0),
    ],
)
def test_calibration_mends_a_wrong_width(cls, kwargs, link, width):
    la = posterior(cls, **kwargs)
    la.optimize_prior_precision()
    tuned = la.prior_precision
    la.prior_precision = tuned / width
    start = validation_nll(la, link)
    generator = torch.Generator().manual_seed(0)
    result = la.calibrate(validation(), link_approx=link, generator=generator)
    after = validation_nll(la, link)
    assert result.nll_after <= result.nll_before
    if link == "probit":
        assert result.nll_before == pytest.approx(start, rel=1e-3)
        assert result.nll_after == pytest.approx(after, rel=1e-3)
    fine = []
    for factor in torch.logspace(-3, 3, 19):
        la.prior_precision = tuned * factor
        for scale in (0.3, 1.0, 3.0):
            la.covariance_scale, la.likelihood_temperature = scale, result.likelihood_temperature
            fine.append(validation_nll(la, link))
    assert after <= min(fine) * 1.02


def test_calibration_is_in_force_until_the_next_fit_or_tuning():
    la = posterior(**LOW)
    plain = la(token_batch((4, 2)))
    mean, covariance = la._glm_predictive_distribution(token_batch((4, 2)))
    la.covariance_scale, la.likelihood_temperature = 3.0, 2.0
    scaled = la._glm_predictive_distribution(token_batch((4, 2)))
    assert_near(list(scaled), [mean / 2, covariance * 3 / 4])
    la.optimize_prior_precision()
    assert la.covariance_scale == la.likelihood_temperature == 1
    la.covariance_scale, la.prior_precision = 3.0, 1.0
    la.fit(loader())
    assert_near(la(token_batch((4, 2))), plain)


def test_calibration_widens_sampled_weights_too():
    la = posterior(name="bert", prior_precision=1e3, **DENSE)
    la.covariance_scale = 25.0
    batch = token_batch((4, 2))
    spread = la.functional_samples(batch, pred_type="nn", n_samples=200).var(0)
    expected = la._glm_predictive_distribution(batch)[1].diagonal(dim1=1, dim2=2)
    assert_near(spread, expected, 0.4)


def test_reports_say_what_was_chosen():
    la = posterior(**LOW)
    text = str(la.calibrate(validation()))
    for word in ("prior precision", "covariance scale", "likelihood temperature", "NLL", "ECE"):
        assert word in text


@pytest.mark.parametrize("method", ["gridsearch", "val_gd"])
def test_validation_data_must_be_there_and_have_labels(method):
    la = posterior(prior_precision=2.5, **LOW)
    unlabelled = [{k: v for k, v in x.items() if k != "labels"} for x in validation().dataset]
    for data, match in (
        (None, "needs `val_loader`"),
        (DataLoader([], batch_size=2), "validation loader is empty"),
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
    with pytest.raises(TypeError):
        la.optimize_prior_precision(method="val_gd", val_loader=validation(), grid_size=3)
