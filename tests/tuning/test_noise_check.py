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
    with pytest.warns(UserWarning, match=f"are {width}. Give tune_sigma_noise=True"):
        la.optimize_prior_precision(correction=False)  # with it, other data are noticed first


def test_a_noise_far_below_the_residuals_is_pointed_out():
    with pytest.warns(UserWarning, match=r"noise is 0\.1, .* are too narrow\. .* method='loo'"):
        fitted(1.0, sigma_noise=0.1).optimize_prior_precision()
    fitted(1.0, sigma_noise=9.0).optimize_prior_precision()  # may be known; warnings are errors


@pytest.mark.slow
def test_a_noise_that_is_given_tuned_or_right_is_not():
    """Warnings are errors here."""
    fitted(1.0).optimize_prior_precision()
    fitted(100.0, sigma_noise=90.0).optimize_prior_precision()
    fitted(100.0).optimize_prior_precision(tune_sigma_noise=True)
