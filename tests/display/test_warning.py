"""Warnings name the user's own line, whatever lies between."""

import inspect
from dataclasses import replace

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.display.warning import warn
from support.batches import loader
from support.models import peft_model


def test_frames_of_the_package_and_of_torch_are_passed_by():
    package = {"__name__": "laplace_lora.somewhere", "warn": warn}

    @torch.no_grad()
    def decorated():
        exec("warn('careful')", package)
        return inspect.currentframe().f_lineno - 1

    with pytest.warns(UserWarning, match="careful") as caught:
        line = decorated()
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]


def test_a_tuning_names_the_call():
    la = KronLoraLaplace(peft_model("bert"), "regression")
    la.fit(loader(likelihood="regression"))
    la.state = replace(la.state, loss=1e4 * la.state.loss)
    with pytest.warns(UserWarning, match="Give tune_sigma_noise=True") as caught:
        line = inspect.currentframe().f_lineno + 1
        la.optimize_prior_precision(correction=False)
    assert [(each.filename, each.lineno) for each in caught] == [(__file__, line)]
