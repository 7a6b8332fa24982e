"""Calibration of width and temperature on validation data."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from support.batches import loader, token_batch, validation
from support.posteriors import DENSE, LOW, posterior
from support.references import assert_near, validation_nll


@pytest.mark.parametrize(
    "cls,kwargs,link,width",
    [
        *((KronLoraLaplace, LOW, link, w) for link in ("probit", "mc") for w in (0.1, 1.0, 10.0)),
        (KronLoraLaplace, LOW, "quadrature", 10.0),
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


def test_cross_fitting_leaves_out_what_it_scores():
    la = posterior(**LOW)
    twin = posterior(**LOW)
    data = loader(lengths=(4, 6, 2, 5, 3, 6, 1, 4) * 4, seed=7)
    found = la.calibrate(data)
    rows = [row for batch in data for row in split_rows(batch)]
    total = 0.0
    for fold in range(5):
        twin.optimize_prior_precision(method="marglik")  # undoes a calibration
        twin.prior_precision = 1.0
        others = [row for i, row in enumerate(rows) if i % 5 != fold]
        twin.calibrate(DataLoader(others, batch_size=len(others)))
        mine = [row for i, row in enumerate(rows) if i % 5 == fold]
        batch = next(iter(DataLoader(mine, batch_size=len(mine))))
        p = twin(batch).gather(1, batch["labels"].unsqueeze(1))
        total -= float(p.log().sum())
    assert found.nll_cross_fitted == pytest.approx(total / len(rows), rel=0.03)


def split_rows(batch):
    return [{k: v[i] for k, v in batch.items()} for i in range(len(batch["labels"]))]


def test_reports_say_what_was_chosen():
    la = posterior(**LOW)
    text = str(la.calibrate(validation()))
    for word in (
        "prior precision",
        "covariance scale",
        "likelihood temperature",
        "cross-fitted",
        "ECE",
    ):
        assert word in text
