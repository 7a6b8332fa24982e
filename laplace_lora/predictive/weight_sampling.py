"""Predictions from sampled weights: the model itself, run once a sample (NN predictive).

How a posterior draws weights belongs to the posterior classes, the linearised predictive and the
choice between the two to `predictive`.
"""

from __future__ import annotations

from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Tensor

from laplace_lora.models.modes import evaluation_mode, set_weights, weights_kept


class WeightSampling(ParametricLaplace):
    """The part of a posterior class that runs the model with drawn weights.

    Attributes:
        covariance_scale: Factor of the predictive covariance, 1 unless calibrated.
        likelihood_temperature: Divides the logits before the softmax, 1 unless calibrated.
    """

    covariance_scale: float = 1.0
    likelihood_temperature: float = 1.0

    @torch.no_grad()
    def _nn_functional_samples(
        self, X: Any, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        self._check_H_init()
        if self.enable_backprop:
            raise ValueError("pred_type='nn' cannot be differentiated; use pred_type='glm'")
        outputs = []
        with evaluation_mode(self.model), weights_kept(self.params):
            for _ in range(n_samples):
                set_weights(self.params, self._scaled_sample(generator))
                outputs.append(self.model(X))
        return torch.stack(outputs) / self.likelihood_temperature

    def _nn_predictive_samples(
        self, X: Any, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        outputs = self._nn_functional_samples(X, n_samples, generator)
        return outputs.softmax(-1) if self.likelihood == "classification" else outputs

    def _scaled_sample(self, generator: torch.Generator | None) -> Tensor:
        """Return one sample of the weights, with the calibrated width."""
        return self.mean + self.covariance_scale**0.5 * (self.sample(1, generator)[0] - self.mean)
