"""Settings that are changed in place change one posterior, and all that follows from it."""

import copy

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from support.batches import token_batch, validation
from support.models import peft_model
from support.posteriors import LOW, posterior
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
CLASSES = [(KronLoraLaplace, LOW), (DiagLoraLaplace, {}), (LowRankLoraLaplace, {"rank": 4})]


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_the_gradient_term_is_that_of_the_present_mean(cls, kwargs, tmp_path):
    la = posterior(cls, name="bert", **kwargs)
    la.log_marginal_likelihood(correction=True)
    la.prior_mean.add_(0.1)
    expected = posterior(cls, name="bert", **kwargs)
    expected.prior_mean = 0.1
    value = expected.log_marginal_likelihood(correction=True)
    assert_near(la.log_marginal_likelihood(correction=True), value, 1e-9)
    for precision in ("half", "exact"):
        la.save_pretrained(tmp_path, precision=precision)
        loaded = cls.from_pretrained(la.logits_model, tmp_path)
        assert_near(loaded.log_marginal_likelihood(correction=True), value, 1e-3)
        loaded.prior_mean.sub_(0.1)
        assert loaded.fitted.state.subspace is None or not loaded.fitted.state.has_subspace


def test_others_keep_theirs():
    la = posterior(name="bert", **LOW)
    evidence, probs = la.log_marginal_likelihood(), la(BATCH)
    loaded = KronLoraLaplace(la.logits_model, "classification", **LOW)
    loaded.load_state_dict(la.state_dict())
    for other in (loaded, copy.copy(la), copy.deepcopy(la)):
        other.prior_precision.mul_(0.01)
        other.prior_mean.add_(0.3)
        other.sigma_noise.add_(0)
        assert torch.equal(la.log_marginal_likelihood(), evidence)
        assert torch.equal(la(BATCH), probs)
        assert not torch.equal(other(BATCH), probs)


def test_a_state_that_was_kept_stays_as_it_was():
    la = posterior(name="bert", **LOW)
    kept, probs = la.state_dict(), la(BATCH)
    la.prior_precision.mul_(0.01)
    la.load_state_dict(kept)
    assert torch.equal(la(BATCH), probs)


def test_copies_are_differentiated_by_the_same_prior():
    la = posterior(name="bert", **LOW)
    prior = torch.ones(1, dtype=torch.float64).requires_grad_()
    la.prior_precision = prior
    slopes = [
        torch.autograd.grad(each.log_marginal_likelihood(), prior) for each in (la, copy.copy(la))
    ]
    assert slopes[0] == slopes[1]


def test_reports_keep_what_they_found():
    la = posterior(name="bert", **LOW)
    la.optimize_prior_precision(method="marglik", correction=False)
    tuning, chosen = la.tuning, float(la.prior_precision)
    la.prior_precision.mul_(10)
    assert la.tuning is None and float(tuning.prior_precision) == chosen
    report = la.calibrate(validation())
    chosen = float(la.prior_precision)
    la.prior_precision.mul_(10)
    assert float(report.prior_precision) == chosen


def test_models_are_not_shared_by_accident():
    model = peft_model("bert")
    first, second = (DiagLoraLaplace(model, "classification") for _ in range(2))
    first.prior_precision.mul_(5)
    assert float(second.prior_precision) == 1
