"""Calibrating a regression on validation targets."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from laplace_lora.data.distributed import ALONE
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import ValidationCache, scoring_of
from laplace_lora.tuning.validation.cached_rows import INTERVALS, CachedTargets
from support.batches import loader
from support.models import peft_model

LENGTHS = (3, 6, 4, 6, 1, 5, 2, 4, 4, 3, 2, 5)
VALIDATION = (4, 6, 2, 5, 3, 6, 1, 4) * 8


def data(lengths=LENGTHS, seed=0, factor=1.0):
    made = loader(4, lengths, "regression", seed=seed)
    for row in made.dataset:
        row["labels"] = factor * row["labels"]
    return made


def fitted(cls=KronLoraLaplace, factor=1.0, **kwargs):
    la = cls(peft_model("bert", dtype=torch.float64), "regression", **kwargs)
    la.fit(data(factor=factor))
    return la


def rows_of(la, start=(0.0, 0.0, 0.0)):
    scoring = scoring_of(la.fitted, "quadrature", 0)
    groups = torch.zeros(len(la.block_names), dtype=torch.long)
    options = (groups, scoring.readout, False, None, ALONE)
    cache = ValidationCache(Predictor(la.fitted), data(VALIDATION, 7), *options)
    return CachedTargets(cache, cache.mean, float(la.sigma_noise), start)


def validation_nll(la):
    total, seen = 0.0, 0
    for batch in data(VALIDATION, 7):
        mean, covariance = la(batch)
        noise = la.sigma_noise**2 * torch.eye(mean.shape[1]).to(mean)
        total -= float(MultivariateNormal(mean, covariance + noise).log_prob(batch["labels"]).sum())
        seen += len(mean)
    return total / seen


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace])
def test_a_point_predicts_what_a_posterior_with_its_settings_does(cls):
    la = fitted(cls, sigma_noise=0.7, prior_precision=2.0)
    rows = rows_of(la)
    point = (0.4, -0.8, 0.5)
    losses = float(rows.losses(point).mean())
    la.prior_precision = la.prior_precision * math.exp(0.4)
    la.covariance_scale = math.exp(-0.8)
    la.sigma_noise = la.sigma_noise * math.exp(0.5)
    assert losses == pytest.approx(validation_nll(la), rel=1e-5)


def test_intervals_are_equally_probable_at_the_start():
    rows = rows_of(fitted())
    p = rows.events((0.0, 0.0, 0.0))
    assert p.shape == (len(VALIDATION), 3, INTERVALS)
    torch.testing.assert_close(p, torch.full_like(p, 1 / INTERVALS), rtol=1e-6, atol=1e-9)
    narrower = rows.events((0.0, 0.0, -0.5))
    torch.testing.assert_close(narrower.sum(-1), torch.ones_like(narrower.sum(-1)))
    assert (narrower[..., INTERVALS // 2] > p[..., INTERVALS // 2]).all()


def test_calibration_error_is_that_of_quantiles():
    la = fitted()
    rows = rows_of(la)
    predictive = Normal(rows.cache.mean, 1.0)
    rows.cache.y.copy_(predictive.icdf(torch.rand(1).double().expand_as(rows.cache.y)))
    one_sided = rows.ece((-30.0, -20.0, 0.0))  # no width, unit noise
    assert one_sided > 0.2
    levels = (torch.arange(len(VALIDATION)).double() + 0.5) / len(VALIDATION)
    rows.cache.y.copy_(predictive.icdf(levels.unsqueeze(1).expand_as(rows.cache.y)))
    assert rows.ece((-30.0, -20.0, 0.0)) < 0.03


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
def test_calibration_lowers_the_validation_loss(cls):
    la = fitted(cls, sigma_noise=4.0, prior_precision=0.01)
    before = validation_nll(la)
    found = la.calibrate(data(VALIDATION, 7))
    assert found.nll_before == pytest.approx(before, rel=1e-4)
    assert found.nll_after == pytest.approx(validation_nll(la), rel=1e-4)
    assert found.nll_after < before - 0.5
    assert found.ece_after < found.ece_before
    assert float(la.sigma_noise) == pytest.approx(found.sigma_noise)
    assert la.likelihood_temperature == 1.0
    assert "observation noise" in str(found) and "temperature" not in str(found)
    assert 0.5 < found.sigma_noise < 1.7  # the targets are standard normal


def test_a_moved_mean_is_calibrated_as_well():
    la = fitted()
    la.recentre(precision=1.0)
    shift = la.state.settings.shift
    found = la.calibrate(data(VALIDATION, 7))
    assert not torch.equal(la.state.settings.shift, shift)
    assert found.nll_after == pytest.approx(validation_nll(la), rel=1e-4)


def test_a_file_keeps_it(tmp_path):
    la = fitted()
    la.calibrate(data(VALIDATION, 7))
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert validation_nll(again) == pytest.approx(validation_nll(la), rel=1e-5)
