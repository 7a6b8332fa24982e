"""Regression: targets with Gaussian noise around the model's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import OUTPUTS, Likelihood, Readout, Scoring
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.roots import identity_root
from laplace_lora.likelihoods.splitting import split_mapping_or_pair


class Regression(Likelihood):
    """The likelihood ``y ~ N(f, σ²)``; losses and roots are those of unit noise."""

    name = "regression"
    laplace_name = "regression"
    has_noise = True

    def split(
        self, batch: Any, label_key: str, device: torch.device, dtype: torch.dtype
    ) -> tuple[Any, Tensor]:
        """Split a batch into inputs and targets ``(batch, outputs)`` of a dtype."""
        x, y = split_mapping_or_pair(batch, label_key, device)
        y = y.to(dtype)
        return x, y.unsqueeze(-1) if y.ndim == 1 else y

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ``½‖f − y‖²``, summed over the batch: as laplace-torch counts it, no constant.

        Raises:
            ValueError: If targets have another shape than ``f``.
        """
        if y.shape != f.shape:
            raise ValueError(
                f"regression targets have shape {tuple(y.shape)}, the model's outputs "
                f"{tuple(f.shape)}; give one target per output"
            )
        return 0.5 * (f - y).square().sum()

    def root(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the root of the identity, ``(outputs, batch, outputs)``."""
        return identity_root(f)

    def sampled_root(self, f: Tensor, num_samples: int, y: Tensor) -> Tensor:
        """Return standard normal columns, scaled by ``1/√num_samples``."""
        columns = torch.randn(num_samples, *f.shape, dtype=f.dtype, device=f.device)
        return columns.div_(num_samples**0.5)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """Return ``f − y``, ``(1, batch, outputs)``."""
        return (f - y).unsqueeze(0)

    def residual_weights(self, root: Tensor, f: Tensor, y: Tensor) -> Tensor | None:
        """Return ``f − y``: the root is the identity."""
        return (f - y).T

    def n_columns(self, outputs: int) -> int:
        """Return ``outputs``."""
        return outputs

    def readout(self, x: Any, pairs: bool = False, contrasts: bool = False) -> Readout:
        """Return the outputs."""
        return OUTPUTS

    def scoring(self, link: Link, noise: float) -> Scoring:
        """Return the scoring of Gaussian predictions."""
        return GaussianScoring(noise)


@dataclass(frozen=True)
class GaussianScoring:
    """Scores Gaussian predictions of targets.

    Attributes:
        noise: Standard deviation of the observation noise.
        readout: The outputs.
    """

    noise: float
    readout: Readout = OUTPUTS

    def nll(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Return each example's negative log likelihood in nats, ``(…, batch)``."""
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        total = covariance + self.noise**2 * eye
        log_prob: Tensor = torch.distributions.MultivariateNormal(mean, total).log_prob(y)
        return -log_prob

    def metric_arguments(self, mean: Tensor, covariance: Tensor) -> list[tuple[Tensor, ...]]:
        """Return mean and covariance for each covariance of a grid."""
        return [(mean, matrix) for matrix in covariance]
