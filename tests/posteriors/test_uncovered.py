"""Posteriors with diagonal blocks beside Kronecker factors."""

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from support.batches import loader, token_batch
from support.posteriors import LOW
from support.references import assert_near, explicit_jacobians
from support.sweeps import rest_slow
from support.uncovered import uncovered_model

BATCH = token_batch((4, 2, 5))


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (DiagLoraLaplace, {})])
@pytest.mark.parametrize("key", rest_slow(["norms of bert", "deberta"], 0))
def test_posteriors_fit_predict_merge_and_come_back(key, cls, kwargs, tmp_path):
    model = uncovered_model(key)
    la = cls(model, "classification", uncovered="diag", **kwargs)
    assert la.estimate_memory(BATCH).curvature > 0
    la.fit(loader(2))
    la.optimize_prior_precision()
    jacobians = torch.cat([j.flatten(2) for j in explicit_jacobians(model, BATCH)], -1)
    mean, covariance = la._glm_predictive_distribution(BATCH)
    assert_near(covariance, la.functional_variance(jacobians))
    assert_near(mean, model(BATCH).detach())
    la.save_pretrained(tmp_path, precision="exact")
    again = cls.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert la(BATCH, pred_type="nn", link_approx="mc", n_samples=2).isfinite().all()
    reference = la.log_marginal_likelihood()
    la.fit(loader(7, pad_to=9))
    assert_near(la.log_marginal_likelihood(), reference)
    again.fit(loader(7), override=False)
    once = cls(model, "classification", uncovered="diag", **kwargs)
    once.fit(loader(7))
    twice = cls(model, "classification", uncovered="diag", **kwargs)
    twice.fit(loader(3))
    twice.merge([once])
    again.prior_precision = twice.prior_precision
    assert again.n_data == twice.n_data == 14
    assert_near(again(BATCH), twice(BATCH))


def test_the_posterior_is_a_gaussian_with_that_precision():
    la = KronLoraLaplace(
        uncovered_model("norms of bert"), "classification", uncovered="diag", **LOW
    )
    la.fit(loader())
    P = la.posterior_precision
    assert_near(P.diag(-1), P.to_matrix(-1).diagonal())
    assert_near(P.logdet(), torch.logdet(P.to_matrix()))
    assert_near(P.to_matrix() @ P.to_matrix(-1), torch.eye(la.n_params).double())
    assert la.sample(2).shape == (2, la.n_params)
