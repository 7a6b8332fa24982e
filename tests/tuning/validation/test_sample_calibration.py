"""Calibration of classifiers with so many classes that predictions come from samples."""

import logging
import math

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from laplace_lora.data.inapplicable import InapplicableError
from laplace_lora.models.tangents import forward_mode
from laplace_lora.tuning import tuner
from laplace_lora.tuning.validation import cache, calibration_search
from support.batches import split_rows, token_batch
from support.models import peft_model
from support.opaque import Opaque
from support.references import assert_near

MANY = 50


def many_classes():
    options = {"backend_kwargs": {"stochastic": True, "num_samples": 1}, "prior_precision": 0.1}
    la = KronLoraLaplace(peft_model("bert", num_labels=MANY), "classification", **options)
    la.fit(data(8, 0), evidence_correction=False)
    return la


def data(count, seed, batch_size=8):
    batch = token_batch((4, 6, 2, 5) * (count // 4), labels=MANY, seed=seed)
    return DataLoader(split_rows(batch), batch_size=batch_size)


def losses(la, loader, **options):
    """Of each row, in nats."""
    found = [
        -la(batch, **options).gather(1, batch["labels"].unsqueeze(1)).log().squeeze(1)
        for batch in loader
    ]
    return torch.cat(found)


def test_many_classes_are_calibrated_for_the_samples_that_predict():
    la, labelled = many_classes(), data(16, 1)
    before, prior = float(losses(la, labelled).mean()), la.prior_precision.clone()
    report = la.calibrate(labelled)
    after = losses(la, labelled)
    assert report.nll_before == pytest.approx(before, rel=1e-6)
    assert report.nll_after == pytest.approx(float(after.mean()), rel=1e-6)
    assert report.nll_after < report.nll_before - 0.1
    assert torch.equal(la.prior_precision, prior)
    exact = losses(la, labelled, method="exact")
    assert float(exact.mean()) == pytest.approx(report.nll_after, rel=0.02)


@pytest.mark.slow
def test_of_many_rows_of_many_classes_some_are_searched(monkeypatch):
    monkeypatch.setattr(calibration_search, "SEARCHED", 10)
    la, labelled = many_classes(), data(16, 1)
    before = float(losses(la, labelled).mean())
    report = la.calibrate(labelled)
    assert report.nll_before == pytest.approx(before, rel=1e-6)
    assert report.nll_after == pytest.approx(float(losses(la, labelled).mean()), rel=1e-6)
    assert report.nll_after < report.nll_before


def test_exact_moments_are_calibrated_where_predictions_are_exact(monkeypatch, caplog):
    ways = []
    monkeypatch.setattr(tuner, "calibrate", lambda *_: ways.append("exact") or (None, None))
    sampled = tuner.calibrate_by_samples
    counted = lambda *options: ways.append("sampled") or sampled(*options)  # noqa: E731
    monkeypatch.setattr(tuner, "calibrate_by_samples", counted)
    la = many_classes()
    tuner.Tuner(la.fitted).calibrate(data(8, 1), "probit", 100, None, False)
    assert ways == ["exact"]
    la.model.model.get_base_model().bert.encoder.layer[0].output.dropout = Opaque()
    with caplog.at_level(logging.INFO, logger=tuner.__name__):
        tuner.Tuner(la.fitted).calibrate(data(8, 1), "quadrature", 100, None, False)
    assert ways == ["exact", "sampled", "exact"] and "exact moments" in caplog.text


def test_exact_moments_see_all_of_an_iterator():
    """Samples have been tried on its first batch before."""
    reports = []
    for as_given in (list, iter):
        la = many_classes()
        la.model.model.get_base_model().bert.encoder.layer[0].output.dropout = Opaque()
        reports.append(la.calibrate(as_given(list(data(8, 1, batch_size=4)))).to_dict())
    assert reports[0] == reports[1]


def test_tangents_that_overflow_are_no_nans(monkeypatch):
    """Half-precision outputs may be finite where their derivatives are not."""
    la, (batch,) = many_classes(), data(4, 1)
    exact = la(batch, method="exact")
    run = forward_mode.ForwardMode.run

    def overflowing(self, *arguments):
        values, slopes = run(self, *arguments)
        return values, {name: slope * math.inf for name, slope in slopes.items()}

    monkeypatch.setattr(forward_mode.ForwardMode, "run", overflowing)
    assert_near(la(batch), exact)
    with pytest.raises(InapplicableError, match="tangents are not finite where outputs are"):
        la(batch, method="sampled")


def test_covariances_that_take_much_memory_are_announced(monkeypatch):
    la = many_classes()
    settings = {"val_loader": data(8, 1, 4), "prior_structure": "scalar", "n_steps": 0}
    la.optimize_prior_precision(method="val_gd", **settings)  # without a warning
    monkeypatch.setattr(cache, "LARGE", 2**20)
    with pytest.warns(UserWarning, match=r"49 functions.*4096") as met:
        la.optimize_prior_precision(method="val_gd", **settings)
    assert len([each for each in met if "GiB" in str(each.message)]) == 1
