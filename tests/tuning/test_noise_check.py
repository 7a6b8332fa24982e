"""A regression's noise that was left at 1."""

from dataclasses import replace

import pytest

from laplace_lora import KronLoraLaplace
from support.batches import loader
from support.models import peft_model


def fitted(scale, **kwargs):
    data = loader(likelihood="regression")
    for row in data.dataset:
        row["labels"] = row["labels"] * scale
    la = KronLoraLaplace(peft_model("bert"), "regression", **kwargs)
    la.fit(data)
    return la


@pytest.mark.parametrize("factor,width", [(1e4, "too narrow"), (1e-4, "too wide")])
def test_residuals_of_another_scale_are_pointed_out(factor, width):
    la = fitted(1.0)
    la.state = replace(la.state, loss=factor * la.state.loss)
    with pytest.warns(UserWarning, match=f"is {width}. Give tune_sigma_noise=True"):
        la.optimize_prior_precision(correction=False)  # with it, other data are noticed first


@pytest.mark.slow
def test_a_noise_that_is_given_tuned_or_right_is_not():
    """Warnings are errors here."""
    fitted(1.0).optimize_prior_precision()
    fitted(100.0, sigma_noise=90.0).optimize_prior_precision()
    fitted(100.0).optimize_prior_precision(tune_sigma_noise=True)
