"""A regression's noise, tuned by leave-one-out together with the prior precision."""

import copy
import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.tuning.left_out import width_choice
from laplace_lora.tuning.left_out.linear_model import LinearModel
from laplace_lora.tuning.left_out.profiled_noise import ProfiledNoise, at_residual_noise
from support.batches import loader, token_batch
from support.models import peft_model

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)


def regression_data(batch_size=3):
    return loader(batch_size, LENGTHS, "regression")


def fitted(cls=KronLoraLaplace, **kwargs):
    la = cls(peft_model("bert", dtype=torch.float64), "regression", **kwargs)
    la.fit(regression_data())
    return la


def tuned(cls=KronLoraLaplace, **kwargs):
    la = fitted(cls, **kwargs)
    la.optimize_prior_precision(tune_sigma_noise=True)
    return la


def gaussians(examples=6, outputs=2):
    torch.manual_seed(0)
    roots = torch.randn(examples, outputs, outputs).double()
    mean, targets = torch.randn(2, examples, outputs).double()
    return ProfiledNoise(0.3, mean, targets), roots @ roots.mT


def brute_force(profile, covariance, factor):
    total = covariance + profile.noise**2 * torch.eye(covariance.shape[-1]).double()
    return -MultivariateNormal(profile.mean, factor * total).log_prob(profile.targets)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_best_factor_has_the_lowest_loss(outputs):
    profile, covariance = gaussians(outputs=outputs)
    losses, best = profile.losses(covariance), profile.factor(covariance)
    torch.testing.assert_close(losses, brute_force(profile, covariance, best))
    for other in (0.98 * best, 1.02 * best):
        assert brute_force(profile, covariance, other).mean() > losses.mean()


def test_predictions_without_any_error_have_a_finite_loss():
    profile, covariance = gaussians()
    exact = replace(profile, targets=profile.mean)
    assert exact.factor(covariance) > 0
    assert exact.losses(covariance).isfinite().all()


def jacobians(model, x):
    """Outputs and their derivatives by all trainable weights, example by example."""
    weights = [p for p in model.parameters() if p.requires_grad]
    f = model(x)[0]
    rows = [torch.autograd.grad(out, weights, retain_graph=True) for out in f]
    return f.detach(), torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def by_example(la):
    """Left-out means of the base model, the trained model's Jacobians and the targets."""
    base = copy.deepcopy(la.logits_model).eval()
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    batches = list(regression_data(1))
    y = torch.cat([x["labels"] for x in batches]).double()
    at_base = [jacobians(base, x) for x in batches]
    J = torch.cat([rows for _, rows in at_base])
    means = torch.stack([f for f, _ in at_base])
    linear = LinearModel(J @ J.T, means, y, likelihood_of("regression"), False)
    left_out = linear.leave_one_out(linear.fitted_like(la.state.loss))[0]
    trained = torch.stack([jacobians(la.logits_model.eval(), x)[1] for x in batches])
    return left_out, trained, y


def test_prior_and_noise_are_the_best_of_brute_force_deletion(monkeypatch):
    # So few examples cannot tell the best width from others.
    monkeypatch.setattr(width_choice, "_are_as_good", lambda *_: False)
    la = tuned(FullLoraLaplace)
    mean, J, y = by_example(la)
    eye = torch.eye(J.shape[-1]).double()

    def loss(delta, sigma):
        total = 0.0
        for i in range(len(y)):
            others = J[torch.arange(len(y)) != i].flatten(0, 1)
            precision = others.T @ others / sigma**2 + delta * eye
            covariance = J[i] @ torch.linalg.solve(precision, J[i].T)
            noise = sigma**2 * torch.eye(y.shape[1]).double()
            total -= float(MultivariateNormal(mean[i], covariance + noise).log_prob(y[i]))
        return total / len(y)

    chosen = float(la.prior_precision), float(la.sigma_noise)
    report = la.tuning.leave_one_out
    assert not report.is_widthless and report.noise == pytest.approx(chosen[1])
    assert loss(*chosen) == pytest.approx(report.nll, rel=1e-6)
    for a, b in itertools.product((0.8, 1.0, 1.25), (0.96, 1.0, 1.04)):
        if (a, b) != (1.0, 1.0):
            assert loss(a * chosen[0], b * chosen[1]) > report.nll


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace])
def test_the_noise_before_does_not_matter(cls):
    reference = tuned(cls)
    other = tuned(cls, sigma_noise=30.0, prior_precision=1e-3)
    assert float(other.sigma_noise) == pytest.approx(float(reference.sigma_noise), rel=1e-3)
    assert float(other.prior_precision) == pytest.approx(float(reference.prior_precision), rel=0.02)
    assert "observation noise" in str(reference.tuning)


def test_no_width_is_said_to_be_none():
    report = tuned().tuning.leave_one_out  # so few examples ask for none
    assert report.is_widthless and "no width helps" in str(report)


def in_unit(unit, cls, **kwargs):
    """A posterior over a head alone: of one network and its texts, with targets in any unit."""
    model = peft_model("bert", dtype=torch.float64)
    model.requires_grad_(False)
    head = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    head.requires_grad_(True)
    rows = loader(1, 3 * LENGTHS, "regression").dataset
    wrapped = LogitsModel(model.eval())
    for row in rows:
        outputs = wrapped({k: v[None] for k, v in row.items() if k != "labels"})[0].detach()
        row["labels"] = unit * (outputs + 0.3 * row["labels"].double())
    for parameter in head.parameters():
        parameter.data *= unit
    la = cls(model, "regression", **kwargs)
    la.fit(DataLoader(rows, batch_size=12))
    return la


@pytest.mark.filterwarnings("ignore:the adapter is frozen")
@pytest.mark.parametrize("cls", [FullLoraLaplace, KronLoraLLLaplace])
def test_no_width_is_none_in_any_unit(cls):
    noises = []
    for unit in (1.0, 1e-7, 1e-4, 1e5):
        la = in_unit(unit, cls)
        la.optimize_prior_precision(tune_sigma_noise=True)
        assert "no width helps" in str(la.tuning)
        x = token_batch((4, 2, 5), seed=3)
        deviations = la({k: v for k, v in x.items() if k != "labels"})[1].diagonal(dim1=1, dim2=2)
        assert float(deviations.max()) < (0.04 * float(la.sigma_noise)) ** 2
        noises.append(float(la.sigma_noise) / unit)
    assert noises == pytest.approx(noises[:1] * 4, rel=2e-3)


@pytest.mark.filterwarnings("ignore:the adapter is frozen")
@pytest.mark.parametrize("cls", [FullLoraLaplace, KronLoraLLLaplace])
def test_a_width_is_the_same_in_any_unit(cls):
    precisions = []
    for unit in (1.0, 1e-6, 1e-4, 1e2, 1e5):
        la = in_unit(unit, cls, sigma_noise=0.25 * unit)
        la.optimize_prior_precision()
        assert not la.tuning.leave_one_out.is_widthless
        precisions.append(float(la.prior_precision) * unit**2)
    assert precisions == pytest.approx(precisions[:1] * 5, rel=0.01)


def test_a_noise_that_is_given_stays():
    la = fitted(sigma_noise=0.5)
    la.optimize_prior_precision()
    assert la.tuning.method == "loo" and la.tuning.leave_one_out.noise is None
    assert float(la.sigma_noise) == 0.5
    assert la.tuning.leave_one_out.nll <= la.tuning.leave_one_out.nll_map + 1e-9
    assert "observation noise" not in str(la.tuning)


def test_a_loss_that_is_zero_or_unknown_leaves_the_start():
    la = fitted(sigma_noise=0.5)
    for loss in (0.0, math.nan, math.inf):
        la.state = replace(la.state, loss=loss)
        assert at_residual_noise(la.fitted) is la.fitted


def test_last_layers_have_the_noise_of_the_data():
    """Targets are standard normal, and the model has learnt nothing of them."""
    la = tuned(FullLoraLLLaplace)
    assert 0.5 < float(la.sigma_noise) < 1.6


def test_only_a_regression_has_noise():
    la = KronLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    for method in ("auto", "loo", "marglik"):
        with pytest.raises(ValueError, match="only a regression has observation noise"):
            la.optimize_prior_precision(method=method, tune_sigma_noise=True)


def test_a_file_keeps_the_noise_and_what_chose_it(tmp_path):
    la = tuned()
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert again.tuning.leave_one_out == la.tuning.leave_one_out
    assert float(again.sigma_noise) == pytest.approx(la.tuning.leave_one_out.noise)
