"""The memory estimate against what is really held."""

import pytest
import torch
from test_posterior import DENSE, LOW, loader
from torch import nn

from laplace_lora import DiagLoraLaplace, FullLoraLLLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.structures import sizes as memory
from tiny import peft_model, token_batch

BATCH = token_batch((6,) * 8)


@pytest.mark.parametrize("kwargs", [DENSE, LOW])
def test_the_curvature_is_bounded_by_what_is_held(kwargs):
    la = KronLoraLaplace(peft_model("llama", dtype=torch.float32), "classification", **kwargs)
    estimate = la.estimate_memory(BATCH)
    la.fit(loader())
    eigen = {id(side): side for sides in la.H.blocks for side in sides}.values()
    held = la.H_facs.nbytes + sum(side.vectors.nbytes for side in eigen)
    assert 0.5 * estimate.curvature < held < 1.1 * estimate.curvature


def test_other_structures_count_their_numbers():
    model = peft_model("bert", dtype=torch.float32)
    diag = DiagLoraLaplace(model, "classification")
    assert diag.estimate_memory(BATCH).curvature == 4 * diag.n_params
    full = FullLoraLLLaplace(model, "classification")
    assert full.estimate_memory(BATCH).curvature == 4 * full.n_params**2


def test_activations_are_those_of_the_graph_and_grow_with_the_batch():
    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 4)

        def forward(self, x):
            return self.layer(x).square()  # keeps x and the layer's output

    la = DiagLoraLaplace(LogitsModel(Squares()), "regression")
    one, many = (la.estimate_memory(torch.randn(n, 10)) for n in (1, 16))
    assert one.activations == 4 * (10 + 4)
    assert many.activations == 16 * one.activations and many.batch_size == 16
    assert many.jacobian == 2 * 4 * 16 * 4 * 40
    assert many.fit == many.predict == many.activations + many.curvature + many.jacobian


def test_advice_fits_the_need(monkeypatch):
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float32), "classification")
    estimate = la.estimate_memory(BATCH)
    assert estimate.fits and "Too much" not in str(estimate)
    tight = estimate.curvature + (estimate.activations + estimate.jacobian) // 2
    monkeypatch.setattr(memory, "available", lambda device: tight)
    estimate = la.estimate_memory(BATCH)
    assert not estimate.fits and "use batches of 4" in str(estimate)
    smaller = la.estimate_memory({key: value[:4] for key, value in BATCH.items()})
    assert smaller.fits
    monkeypatch.setattr(memory, "available", lambda device: 10)
    assert "lower `factor_rank`" in str(la.estimate_memory(BATCH))
    monkeypatch.setattr(memory, "available", lambda device: estimate.curvature + 10)
    assert "shorten the inputs" in str(la.estimate_memory(BATCH))
