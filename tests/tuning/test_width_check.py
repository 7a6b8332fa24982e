"""A posterior that predicts its own training examples badly says so."""

import warnings

import pytest
import torch

from laplace_lora.tuning.width_check import warn_if_wide
from support.batches import loader, token_batch
from support.posteriors import posterior


def trained():
    """A classifier that has learnt its labels."""
    la = posterior(name="bert", fit=False)
    batch = token_batch((3, 6, 4, 6, 1, 5, 2))
    optimizer = torch.optim.Adam(la.params, lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        la.objective.nll(la.model(batch), batch["labels"]).backward()
        optimizer.step()
    la.model.zero_grad()
    la.fit(loader())
    return la


def test_a_wide_posterior_warns_with_the_difference():
    la = trained()
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
    la = trained()
    la.prior_precision = 1e6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_wide(la.fitted, loader())


def test_the_marginal_likelihood_is_checked(monkeypatch):
    la = trained()
    monkeypatch.setattr("laplace_lora.tuning.width_check.LIMIT", -10.0)
    with pytest.warns(UserWarning, match="it is too wide"):
        la.optimize_prior_precision(method="marglik")
