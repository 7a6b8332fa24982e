"""`Query`: what is asked of a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from laplace_lora.likelihoods.links import QUADRATURE
from laplace_lora.predictive.linear_samples import AUTO

NETWORKS = 100  # samples of the weights for pred_type="nn", and of a batch's logits for "mc"
LINK_SAMPLES = 1000  # of the logits of a whole data set for "mc", and of tokens


@dataclass(frozen=True)
class Query:
    """The options of `LoraLaplace.__call__`, which explains them."""

    pred_type: str = "glm"
    joint: bool = False
    link_approx: str = QUADRATURE
    n_samples: int | None = None
    diagonal_output: bool = False
    generator: torch.Generator | None = None
    fitting: bool = False
    method: str = AUTO

    def samples(self, default: int) -> int:
        """Return how many samples are asked for."""
        return default if self.n_samples is None else self.n_samples

    def check_plain(self, task: str) -> None:
        """Refuse options that only outputs of whole examples have.

        Args:
            task: What has none of them, for the error.

        Raises:
            ValueError: If one is given.
        """
        if self.joint or self.diagonal_output or self.fitting:
            raise ValueError(
                f"joint, diagonal_output and fitting mean nothing to {task}; leave them out"
            )
