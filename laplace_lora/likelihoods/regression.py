"""Regression: targets with Gaussian noise around the model's outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from laplace_lora.likelihoods.base import OUTPUTS, Likelihood, Readout, Scoring
from laplace_lora.likelihoods.links import Link
from laplace_lora.likelihoods.roots import identity_root
from laplace_lora.likelihoods.splitting import split_mapping_or_pair
from laplace_lora.linalg.cholesky import shifted_cholesky


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
        squares, log_dets = whitened(y - mean, covariance, self.noise)
        return 0.5 * (squares + log_dets + mean.shape[-1] * math.log(2 * math.pi))

    def metric_arguments(self, mean: Tensor, covariance: Tensor) -> list[tuple[Tensor, ...]]:
        """Return mean and covariance for each covariance of a grid."""
        return [(mean, matrix) for matrix in covariance]


def whitened(residual: Tensor, covariance: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Return ``rᵀ Σ⁻¹ r`` and ``log det Σ`` of residuals, with ``Σ = covariance + noise² I``.

    Args:
        residual: ``r``, ``(batch, outputs)``.
        covariance: Without the noise, ``(…, batch, outputs, outputs)``.
        noise: Standard deviation of the observation noise.

    Returns:
        Both ``(…, batch)``.
    """
    eye = torch.eye(residual.shape[-1], dtype=covariance.dtype, device=covariance.device)
    root = shifted_cholesky(covariance + noise**2 * eye)
    columns = residual.to(covariance).expand(covariance.shape[:-1]).unsqueeze(-1)
    white = torch.linalg.solve_triangular(root, columns, upper=False).squeeze(-1)
    return white.square().sum(-1), 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
