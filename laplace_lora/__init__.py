"""Calibrated uncertainty for LoRA-fine-tuned transformers, as a plugin for laplace-torch.

The public names; each folder behind them says in its `__init__` what is in it.
"""

from laplace_lora.curvature.backends import LoraEF, LoraGGN
from laplace_lora.curvature.kron_protocol import LowRankKron, LowRankKronDecomposed
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.posteriors.exact import FullLoraLaplace, LowRankLoraLaplace
from laplace_lora.posteriors.factored import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.posteriors.last_layer import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    KronLoraLLLaplace,
)
from laplace_lora.posteriors.last_layer_gp import FunctionalLoraLLLaplace
from laplace_lora.storage.adapter_start import AdapterStart, start_of
from laplace_lora.trainer import LaplaceCallback

__version__ = "0.1.0"

__all__ = [
    "AdapterStart",
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
    "__version__",
    "start_of",
]
