"""Activations that hide their formula in an `autograd.Function`, so have no forward derivative."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BLOOM = "BloomGelu"


def uncover_formulas(model: nn.Module) -> None:
    """Let activations compute by torch's own operations.

    Args:
        model: A module that may be changed for good.
    """
    for module in model.modules():
        if type(module).__name__ == BLOOM and "forward" not in vars(module):
            vars(module)["forward"] = _gelu


def _gelu(x: Tensor) -> Tensor:
    """Approximate the GELU by a tanh, with the constant that BLOOM has rounded.

    Source: Hendrycks & Gimpel (2016), arXiv:1606.08415, Sec. 2.
    """
    return 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3)))
