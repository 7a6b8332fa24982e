"""Outputs in another precision than the weights, as of models that end in `.float()`."""

import pytest
import torch

from laplace_lora import FullLoraLaplace, KronLoraLaplace, LogitsModel
from support.batches import loader, validation
from support.models import peft_model

F32, F64 = torch.float32, torch.float64


def _posterior(cls, weights, outputs):
    model = peft_model("bert", dtype=weights).eval()
    la = cls(LogitsModel(model, output=lambda out: out.logits.to(outputs)), "classification")
    la.fit(loader())
    return la


def _search(la, method):
    la.optimize_prior_precision(method=method, val_loader=validation())
    return la.prior_precision.double()


def _found(la, batch):
    found = la.predict(validation())
    yield found.probs, found.covariance
    yield la(batch), la.functional_samples(batch).isfinite()  # the noise has the outputs' dtype
    la.optimize_prior_precision()
    yield la.prior_precision, la(batch)
    for method in ("gridsearch", "val_gd"):
        yield _search(la, method), la(batch)
    la.recentre(precision=2.0)
    yield la.mean, la(batch)
    la.calibrate(validation())
    yield la.predict(validation()).mutual_information, la(batch)
    yield (
        la.acquire(validation(), 2, "bald").scores,
        la.acquire(validation(), 2, "batchbald").scores > 0,
    )


@pytest.mark.parametrize("cls", [KronLoraLaplace, FullLoraLaplace])
@pytest.mark.parametrize(("weights", "outputs"), [(F32, F64), (F64, F32)])
def test_outputs_of_another_precision_change_nothing(cls, weights, outputs):
    batch = next(iter(validation()))
    plain, mixed = _posterior(cls, weights, weights), _posterior(cls, weights, outputs)
    for expected, found in zip(_found(plain, batch), _found(mixed, batch), strict=True):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b.double(), a.double(), rtol=1e-3, atol=1e-5)
