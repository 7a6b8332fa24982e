"""bayesian_lora's names for the types of factors, for the annotations of scripts that have them."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

activation_t: TypeAlias = Tensor  # of a module's inputs: a covariance, or a root
outgrad_t: TypeAlias = Tensor  # of the gradients with respect to its outputs
KFAC_t: TypeAlias = dict[str, tuple[activation_t, outgrad_t]]  # by module
