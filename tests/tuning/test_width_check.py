"""A posterior that predicts its own training examples badly says so."""

import warnings

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.tuning.width_check import warn_if_wide
from support.batches import loader, token_batch
from support.interruptions import Interruption, interrupted
from support.language import language_posterior, text_loader
from support.memorised import memorised
from support.models import peft_model
from support.multilabel import multilabel_loader, multilabel_posterior
from support.preferences import pair_loader, reward_posterior
from support.spans import question_loader, span_posterior
from support.tokens import tagged_loader, tagged_posterior


def test_a_wide_posterior_warns_with_the_difference():
    la = memorised()
    la.prior_precision = 1e-3
    with torch.no_grad():
        batch = token_batch((3, 6, 4, 6, 1, 5, 2))
        y = batch["labels"].unsqueeze(1)
        own = la.model.eval()(batch).log_softmax(-1).gather(1, y).mean()
    excess = float(own - la(batch).log().gather(1, y).mean())
    assert excess > 0.1
    with pytest.warns(UserWarning, match=f"by {excess:.2f} nats"):
        warn_if_wide(la.fitted, loader())


def test_a_narrow_one_does_not():
    la = memorised()
    la.prior_precision = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_wide(la.fitted, loader())


def test_the_marginal_likelihood_is_checked(monkeypatch):
    la = memorised()
    monkeypatch.setattr("laplace_lora.tuning.width_check.LIMIT", -10.0)
    with pytest.warns(UserWarning, match="it is too wide"):
        la.optimize_prior_precision(method="marglik")


FITTED = {
    "multilabel": lambda: (multilabel_posterior(), multilabel_loader()),
    "reward_modeling": lambda: (reward_posterior(), pair_loader()),
    "language_modeling": lambda: (language_posterior(), text_loader()),
    "token_classification": lambda: (tagged_posterior(), tagged_loader()),
    "question_answering": lambda: (span_posterior(), question_loader()),
}


@pytest.mark.parametrize("likelihood", FITTED)
def test_whatever_the_likelihood(likelihood, monkeypatch):
    la, data = FITTED[likelihood]()
    assert la.likelihood == likelihood
    monkeypatch.setattr("laplace_lora.tuning.width_check.LIMIT", -10.0)
    with pytest.warns(UserWarning, match="it is too wide"):
        la.optimize_prior_precision(method="marglik", correction=False, train_loader=data)


def test_regressions_too(monkeypatch):
    la = KronLoraLaplace(peft_model("bert"), "regression")
    la.fit(loader(likelihood="regression"))
    monkeypatch.setattr("laplace_lora.tuning.width_check.LIMIT", -10.0)
    with pytest.warns(
        UserWarning, match=r"Tune by method='loo', or with validation labels \(`calibrate`, method"
    ):
        la.optimize_prior_precision(method="marglik", correction=False)


def test_no_advice_that_would_be_refused(monkeypatch):
    la = memorised()
    monkeypatch.setattr("laplace_lora.tuning.width_check.LIMIT", -10.0)
    monkeypatch.setattr("laplace_lora.tuning.width_check.why_not", lambda *_: "it is not possible")
    with pytest.warns(UserWarning, match="will predictions be. Tune with validation labels"):
        la.optimize_prior_precision(method="marglik")


def test_an_interruption_of_the_check_leaves_settings_as_they_were(monkeypatch):
    la = memorised()
    la.optimize_prior_precision(method="loo")
    before, tuning = la.state, la.tuning
    monkeypatch.setattr("laplace_lora.posteriors.tuned.warn_if_wide", interrupted)
    with pytest.raises(Interruption):
        la.optimize_prior_precision(method="marglik")
    assert la.state is before and la.tuning is tuning
