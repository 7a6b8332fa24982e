"""The Laplace-LoRA paper's functional interface: factors, evidence and predictive as functions.

Names and arguments follow the bayesian_lora documentation, so that a script changes one import
line; results equal those of `KronLoraLaplace`, but for modules with a bias: here it is the last
column of its weight, there a block of its own. Source: Yang, Robeyns, Wang, Aitchison (2024),
arXiv:2308.13111.

A factor is a covariance ``(d, d)``, or if low-rank a root ``R`` of shape ``(d, n_kfac)`` that
stands for ``R Rᵀ``. Cholesky roots of the covariances, which bayesian_lora's example keeps, are
taken for what they are.
"""

from laplace_lora.functional.cholesky import cholesky_decompose_small_factors, stable_cholesky
from laplace_lora.functional.evidence import model_evidence
from laplace_lora.functional.factor_cache import KFAC_t, activation_t, outgrad_t
from laplace_lora.functional.factors import calculate_kronecker_factors
from laplace_lora.functional.hooks import (
    Hooks,
    register_hooks,
    remove_hooks,
    save_input_hook,
    save_output_grad_hook,
)
from laplace_lora.functional.predictive import jacobian_mean, predict_probs, variance

__all__ = [
    "Hooks",
    "KFAC_t",
    "activation_t",
    "calculate_kronecker_factors",
    "cholesky_decompose_small_factors",
    "jacobian_mean",
    "model_evidence",
    "outgrad_t",
    "predict_probs",
    "register_hooks",
    "remove_hooks",
    "save_input_hook",
    "save_output_grad_hook",
    "stable_cholesky",
    "variance",
]
