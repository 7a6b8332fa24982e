"""Calibrated uncertainty for LoRA-fine-tuned transformers, as a plugin for laplace-torch.

The public names; every module behind them has one job and says so in its first line.
"""

from laplace_lora.curvature import LoraEF, LoraGGN
from laplace_lora.data_space import FullLoraLaplace
from laplace_lora.decomposed import LowRankKronDecomposed
from laplace_lora.kron import LowRankKron
from laplace_lora.last_layer import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLLLaplace,
)
from laplace_lora.low_rank import LowRankLoraLaplace
from laplace_lora.models import LogitsModel
from laplace_lora.posterior import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.trainer import LaplaceCallback

__all__ = [
    "DiagLoraLLLaplace",
    "DiagLoraLaplace",
    "FullLoraLLLaplace",
    "FullLoraLaplace",
    "FunctionalLoraLLLaplace",
    "KronLoraLLLaplace",
    "KronLoraLaplace",
    "LaplaceCallback",
    "LogitsModel",
    "LoraEF",
    "LoraGGN",
    "LowRankKron",
    "LowRankKronDecomposed",
    "LowRankLoraLaplace",
]
