"""What stays of a prior, and what is undone of a calibration, when data come."""

import copy

import pytest
import torch

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from support.batches import loader, token_batch, validation
from support.interruptions import Interrupted, Interruption
from support.language import language_posterior, text_batch, text_loader
from support.models import peft_model
from support.posteriors import EVERY_CLASS, LOW, posterior
from support.references import assert_near
from support.sweeps import rest_slow
from support.tokens import tagged_loader, tagged_posterior

BATCH = token_batch((4, 2, 5), seed=3)
SETTINGS = ["prior_precision", "sigma_noise", "covariance_scale", "likelihood_temperature"]
CLASSES = [*EVERY_CLASS, (FullLoraLaplace, {}), (LowRankLoraLaplace, {"rank": 30})]


def settings(la):
    return [torch.as_tensor(getattr(la, name)).detach().clone() for name in SETTINGS]


def assert_equal(ours, theirs):
    assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))


def assert_undone(la, before, reference):
    """Hold a posterior against one that was never calibrated."""
    assert_equal(settings(la), before)
    assert torch.equal(la(BATCH), reference(BATCH))


def calibrated(cls=KronLoraLaplace, by_tensor=False, **kwargs):
    """Return a calibrated classifier, one that is not, and its settings."""
    la = posterior(cls, "bert", **kwargs)
    la.prior_precision = torch.arange(la.n_layers) + 2.0 if by_tensor else 3.0
    reference, before = copy.deepcopy(la), settings(la)
    la.calibrate(validation())
    for name, value in zip(SETTINGS, before, strict=True):
        assert name == "sigma_noise" or not torch.equal(torch.as_tensor(getattr(la, name)), value)
    return la, reference, before


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_a_calibration_is_undone_as_a_whole(cls, kwargs):
    la, reference, before = calibrated(cls, **kwargs)
    for each in (la, reference):
        each.fit(validation(), override=False)
    assert_undone(la, before, reference)


@pytest.mark.parametrize("by_tensor", [False, True])
@pytest.mark.parametrize("way", ["anew", "merge", "val_gd"])
def test_it_is_undone_by_every_fit_and_tuning(way, by_tensor):
    la, reference, before = calibrated(by_tensor=by_tensor, **LOW)
    for each in (la, reference):
        if way == "anew":
            each.fit(validation())
        elif way == "merge":
            other = KronLoraLaplace(each.logits_model, "classification", **LOW)
            other.fit(validation())
            each.merge([other])
        else:  # which starts from the present prior
            each.optimize_prior_precision(method="val_gd", val_loader=validation(), n_steps=2)
    assert_undone(la, settings(reference) if way == "val_gd" else before, reference)


def test_a_second_calibration_is_undone_with_the_first():
    la, reference, before = calibrated(**LOW)
    la.calibrate(loader())
    la.fit(loader())
    assert_undone(la, before, reference)


@pytest.mark.parametrize("in_place", [False, True])
def test_what_was_set_since_stays(in_place):
    la, reference, before = calibrated(**LOW)
    if in_place:
        la.prior_precision.mul_(2)
    else:
        la.prior_precision = 2 * la.prior_precision
    reference.prior_precision = la.prior_precision
    copied = copy.copy(la)  # over the same model
    la.fit(loader())
    assert_undone(la, [la.prior_precision, *before[1:]], reference)
    assert not torch.equal(la.prior_precision, before[0])
    la.prior_precision.mul_(2)
    copied.fit(loader())
    assert_undone(copied, [reference.prior_precision, *before[1:]], reference)
    la.calibrate(validation())
    reference.prior_precision = 2 * reference.prior_precision
    la.fit(loader())
    assert torch.equal(la(BATCH), reference(BATCH))


def test_a_fit_that_fails_undoes_nothing():
    la, reference, before = calibrated(**LOW)
    chosen, p = settings(la), la(BATCH)
    with pytest.raises(Interruption):
        la.fit(Interrupted(loader(), 1))
    assert_equal(settings(la), chosen)
    assert torch.equal(la(BATCH), p)
    la.fit(loader())
    assert_undone(la, before, reference)


def test_of_a_regression_the_noise_goes_back_too():
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float64), "regression", sigma_noise=4.0)
    la.fit(loader(likelihood="regression"))
    before = settings(la)
    la.calibrate(loader(likelihood="regression", seed=7))
    assert float(la.sigma_noise) < 3
    la.fit(loader(likelihood="regression"))
    assert_equal(settings(la), before)
    la.calibrate(loader(likelihood="regression", seed=7))
    la.sigma_noise = 0.5
    la.fit(loader(likelihood="regression"))
    assert_equal(settings(la), [before[0], torch.tensor(0.5).to(la.sigma_noise), *before[2:]])


CLASSES_OF_TEXTS = [KronLoraLaplace, DiagLoraLaplace, FullLoraLaplace, LowRankLoraLaplace]


@pytest.mark.parametrize("cls", rest_slow(CLASSES_OF_TEXTS, 0, 2))
@pytest.mark.parametrize("way", ["anew", "more data", "merge"])
def test_a_width_that_was_tuned_with_the_prior_stays_with_it(cls, way):
    la = language_posterior(cls)
    la.optimize_prior_precision()
    la.covariance_scale *= 0.5  # texts that were never learnt leave it at 1
    before = settings(la)
    further = text_loader(2, text_batch((5, 3), (2, 1), seed=4))
    if way == "anew":
        la.fit(further)
    elif way == "more data":
        la.fit(further, override=False)
    else:
        other = cls(la.logits_model, "language_modeling")
        other.fit(further)
        la.merge([other])
    assert_equal(settings(la), before)


def test_a_calibration_after_it_goes_back_to_it():
    la = tagged_posterior()
    la.optimize_prior_precision()
    la.covariance_scale *= 0.01
    before = settings(la)
    la.calibrate(tagged_loader())
    assert la.covariance_scale != float(before[2])
    la.prior_precision = 2 * la.prior_precision
    la.fit(tagged_loader(), override=False)
    assert_equal(settings(la), [2 * before[0], *before[1:]])


def test_a_moved_mean_returns_and_the_calibration_with_it():
    la = posterior(name="llama-lm", **LOW)
    la.prior_precision = 50.0
    reference, before = copy.deepcopy(la), settings(la)
    la.recentre(1.0)
    la.calibrate(validation())
    la.fit(loader())
    assert la.state.settings.shift is None
    assert_equal(settings(la), before)
    assert_near(la(BATCH), reference(BATCH))


def test_a_model_in_another_dtype_goes_back_as_well():
    la = posterior(name="bert", dtype=torch.float32, **LOW)
    la.prior_precision = 0.1
    before = settings(la)
    la.calibrate(validation())
    la.logits_model.double()
    la.fit(loader())
    assert la.prior_precision.dtype == torch.float64
    assert torch.equal(la.prior_precision, before[0].double())


@pytest.mark.parametrize("name", ["prior_precision", "covariance_scale"])
def test_what_is_set_to_the_calibrated_value_stays(name):
    la, _, _ = calibrated(**LOW)
    value = getattr(la, name)
    setattr(la, name, value)
    la.fit(loader())
    assert float(getattr(la, name)) == float(value)
