"""Adaptive rank allocation from a posterior: AdaLoRA with IVON or Laplace signal-to-noise scores.

Source: Chen and Garner (2024), *A Bayesian Interpretation of Adaptive Low-Rank Adaptation*,
arXiv:2409.10673.
"""

from laplace_lora.adaptive.allocation import ScoreAllocator, set_importance_score
from laplace_lora.adaptive.callbacks import AdaLoraCallback, IVONCallback
from laplace_lora.adaptive.criteria import CRITERIA, Criterion
from laplace_lora.adaptive.ivon import IVON
from laplace_lora.adaptive.pruning import adalora_to_lora, prune_adapter, remove_pruned_triplets
from laplace_lora.adaptive.scores import PosteriorScore, SensitivityScore

__all__ = [
    "CRITERIA",
    "IVON",
    "AdaLoraCallback",
    "Criterion",
    "IVONCallback",
    "PosteriorScore",
    "ScoreAllocator",
    "SensitivityScore",
    "adalora_to_lora",
    "prune_adapter",
    "remove_pruned_triplets",
    "set_importance_score",
]
