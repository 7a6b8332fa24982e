"""State dictionaries are checked as files are: what no fit gives is refused by name."""

import json

import numpy as np
import pytest
import torch

from laplace_lora import DiagLoraLaplace, FullLoraLLLaplace, KronLoraLaplace, LowRankLoraLaplace
from laplace_lora.linalg.factors import DiagonalFactor
from laplace_lora.storage.files import CONFIG
from support.batches import token_batch
from support.forgery import forge, forge_tensors
from support.posteriors import LOW, posterior
from support.references import assert_near

BATCH = token_batch((4, 2), seed=3)
CLASSES = [
    (DiagLoraLaplace, {}),
    (FullLoraLLLaplace, {}),
    (KronLoraLaplace, {}),
    (KronLoraLaplace, LOW),
    (LowRankLoraLaplace, {"rank": 4}),
]


def negated(H):
    """A curvature with the other sign: what a diagonal or a trace says of it."""
    if isinstance(H, torch.Tensor):
        return -H
    tensors, description = H
    signed = (".matrix", ".trace", ".diagonal", "1")  # the last is a sketch's trace
    return {n: -t if n.endswith(signed) else t for n, t in tensors.items()}, description


def infinite(H):
    if isinstance(H, torch.Tensor):
        return torch.full_like(H, torch.inf)
    tensors, description = H
    return {n: torch.full_like(t, torch.nan) for n, t in tensors.items()}, description


@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_an_impossible_curvature_is_refused(cls, kwargs):
    la = posterior(cls, name="bert", **kwargs)
    state, before = la.state_dict(), la(BATCH)
    with pytest.raises(ValueError, match="negative entries on its diagonal"):
        la.load_state_dict({**state, "H": negated(state["H"])})
    with pytest.raises((ValueError, FloatingPointError), match="is not finite"):
        la.load_state_dict({**state, "H": infinite(state["H"])})
    if isinstance(state["H"], torch.Tensor):
        with pytest.raises(ValueError, match="the curvature has shape"):
            la.load_state_dict({**state, "H": state["H"][:-1]})
    assert torch.equal(la(BATCH), before)


def test_a_negative_factor_is_refused():
    la = posterior(name="bert")
    factors = la.H_facs * 1.0
    factors.kfacs[-1] = [DiagonalFactor(-torch.ones(len(la.params[-1])))]
    with pytest.raises(ValueError, match="negative entries on its diagonal"):
        la.adopt(factors, 7)
    with pytest.raises(ValueError, match="negative entries on its diagonal"):
        la.load_state_dict({**la.state_dict(), "H": factors.kfacs})  # as in earlier versions


WRONG = [
    ("n_data", -3, "n_data is -3"),
    ("n_data", 2.5, r"n_data is 2\.5"),
    ("n_outputs", 0, "n_outputs is 0"),
    ("n_outputs", True, "n_outputs is True"),
    ("loss", "1", "loss is '1'"),
    ("covariance_scale", -1.0, "covariance_scale must be positive"),
    ("likelihood_temperature", "2", "likelihood_temperature must be a positive number"),
    ("prior_precision", torch.tensor([-1.0]), "prior_precision must be positive"),
    ("prior_precision", torch.ones(3), "do not fit the model's tensors"),
    ("prior_precision", torch.ones(()), "do not fit the model's tensors"),
    ("prior_mean", torch.zeros(2), "mean does not fit the model's tensors"),
    ("prior_mean", torch.tensor(torch.nan), "'prior_mean' is not finite"),
    ("temperature", -1.0, "temperature must be positive"),
    ("sigma_noise", torch.ones(2), "do not fit the model's tensors"),
    ("loss_gradient", torch.ones(2), r"loss_gradient has shape \(2,\)"),
    ("shift", torch.ones(2), r"shift has shape \(2,\)"),
]


@pytest.fixture(scope="module")
def fitted():
    return posterior(DiagLoraLaplace, name="bert")


@pytest.mark.parametrize("name,value,message", WRONG)
def test_impossible_values_are_refused(fitted, name, value, message):
    before = fitted(BATCH)
    with pytest.raises(ValueError, match=message):
        fitted.load_state_dict({**fitted.state_dict(), name: value})
    assert torch.equal(fitted(BATCH), before)


def test_weights_that_are_not_finite_are_refused(fitted):
    state = fitted.state_dict()
    with pytest.raises(ValueError, match="'mean' is not finite"):
        fitted.load_state_dict({**state, "mean": state["mean"] * torch.nan})


def test_dictionaries_of_something_else_are_refused(fitted):
    before, state = fitted(BATCH), fitted.state_dict()
    for other, named in (
        ({}, "'cls_name', 'likelihood', 'mean'"),
        (fitted.model.state_dict(), "'cls_name', 'likelihood', 'mean'"),
        ({name: value for name, value in state.items() if name != "H"}, "'H'"),
    ):
        with pytest.raises(ValueError, match=f"has no {named}; load what a posterior's state_dict"):
            fitted.load_state_dict(other)
    assert torch.equal(fitted(BATCH), before)


@pytest.mark.parametrize("name,value", [("n_data", -3), ("n_outputs", True), ("n_data", 2.5)])
def test_files_have_the_same_counts(fitted, tmp_path, name, value):
    fitted.save_pretrained(tmp_path)
    scalars = json.loads((tmp_path / CONFIG).read_text())["scalars"]
    forge(tmp_path, scalars={**scalars, name: value})
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        DiagLoraLaplace.from_pretrained(fitted.logits_model, tmp_path)


def test_a_sketch_with_a_negative_matrix_is_refused(tmp_path):
    """Of few weights it is the whole matrix, which has no trace of its own."""
    la = posterior(LowRankLoraLaplace, name="bert", rank=10**6)
    la.save_pretrained(tmp_path, precision="exact")
    forge_tensors(tmp_path, lambda tensors: tensors["curvature.0"].neg_())
    with pytest.raises(ValueError, match="negative entries on its diagonal"):
        LowRankLoraLaplace.from_pretrained(la.logits_model, tmp_path)


def test_numbers_of_other_kinds_are_taken(tmp_path):
    la = posterior(DiagLoraLaplace, name="bert")
    la.covariance_scale = 2  # a whole number
    expected = la(BATCH)
    again = posterior(DiagLoraLaplace, name="bert", fit=False)
    kinds = {"n_data": np.int64(la.n_data), "loss": torch.tensor(la.loss)}
    again.load_state_dict({**la.state_dict(), **kinds})
    assert_near(again(BATCH), expected)
    assert again.n_data == la.n_data and again.loss == pytest.approx(la.loss)
    la.save_pretrained(tmp_path)
    assert_near(DiagLoraLaplace.from_pretrained(la.logits_model, tmp_path)(BATCH), expected)
