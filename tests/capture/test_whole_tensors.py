"""Tensors without a layer of their own: examples must not mix, layers must not change."""

import pytest
import torch
from torch import nn

from laplace_lora import LoraGGN


def test_models_that_mix_examples_are_refused():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.scale * (x - x.mean(0))

    backend = LoraGGN(Mixing(), "classification", uncovered="diag")
    with pytest.raises(RuntimeError, match="output for example 0 alone differs"):
        backend.jacobians(torch.randn(4, 3))
