"""All names of the package; importing this makes them known to laplace-torch's `Laplace`."""

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
    "start_of",
]
