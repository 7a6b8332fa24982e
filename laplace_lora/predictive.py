"""Predictions of a Gaussian posterior over adapter weights, streamed tensor by tensor.

`StreamingPredictive` is the half of a posterior class that answers ``la(batch)``: the linearised
(GLM) predictive from one forward pass, and the sampling (NN) predictive. Fitting belongs to
`posterior`; the links other than ``"mc"`` are laplace-torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Tensor

from laplace_lora.curvature import LoraCurvature
from laplace_lora.guard import evaluation_mode, set_weights, weights_kept
from laplace_lora.likelihoods import contrast_root


class StreamingPredictive(ParametricLaplace):
    """Predictive half of a posterior; subclasses say what each tensor's covariance is."""

    backend: LoraCurvature

    def block_covariance(self) -> Callable[[int, Tensor], Tensor]:
        """Return a function from a tensor's index and Jacobian to its part of the covariance.

        The function takes ``(batch, outputs, *shape)`` and returns ``J P⁻¹ Jᵀ``, ``(batch, outputs,
        outputs)``.
        """
        raise NotImplementedError

    def __call__(
        self,
        x: Any,
        pred_type: str = "glm",
        joint: bool = False,
        link_approx: str = "probit",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
        fitting: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the posterior predictive of a batch.

        The GLM predictive is ``f ~ N(f_MAP, J P⁻¹ Jᵀ)``. With ``link_approx="mc"`` the softmax does
        not see a shift of all logits, so ``C − 1`` contrasts of logits are propagated and sampled.

        Args:
            x: Batch that the model takes.
            pred_type: ``"glm"`` (linearised) or ``"nn"`` (sampled weights, ``link_approx="mc"``).
            joint: For regression, covariances between the examples as well.
            link_approx: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``.
            n_samples: Samples for ``"mc"``.
            diagonal_output: Ignore covariances between outputs (``"mc"`` and regression).
            generator: Source of the samples, on the posterior's device.
            fitting: Of laplace-torch, for reward models: predict as in training.

        Returns:
            Class probabilities ``(batch, classes)``. For regression mean ``(batch, outputs)`` and
            covariance ``(batch, outputs, outputs)``; if joint ``(batch·outputs,)`` and its square;
            if ``pred_type="nn"`` mean and variance of the samples, ``(batch, outputs)`` each.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If an option is unknown, or the generator is on another device.
        """
        self._check_H_init()
        if pred_type not in ("glm", "nn"):
            raise ValueError(f"pred_type must be 'glm' or 'nn', got {pred_type!r}")
        classifies = self.likelihood == "classification" or (
            self.likelihood == "reward_modeling" and fitting
        )
        sampled = classifies and link_approx == "mc"
        if generator is not None and generator.device != self._device:
            raise ValueError(
                f"the generator is on {generator.device}, the posterior on {self._device}; make it "
                "with torch.Generator(device)"
            )
        if pred_type == "glm" and sampled and not diagonal_output:
            return self._mc_probabilities(x, n_samples, generator)
        if pred_type == "glm" and sampled:
            f_mu, f_var = self._glm_predictive_distribution(x)
            return (
                self._glm_functional_samples(f_mu, f_var, n_samples, True, generator)
                .softmax(-1)
                .mean(0)
            )
        if pred_type == "nn" and (sampled or not classifies):
            outputs = self._nn_functional_samples(x, n_samples, generator)
            return outputs.softmax(-1).mean(0) if classifies else (outputs.mean(0), outputs.var(0))
        return super().__call__(
            x, pred_type, joint, link_approx, n_samples, diagonal_output, generator, fitting
        )

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        self._check_H_init()
        if self.enable_backprop:
            with evaluation_mode(self.model):
                return super()._glm_predictive_distribution(X, joint, diagonal_output)
        f_mu, f_var = self._linearised(X, joint=joint)
        if joint:
            return f_mu.flatten(), f_var.squeeze(0)
        return f_mu, f_var.diagonal(dim1=1, dim2=2) if diagonal_output else f_var

    def _linearised(
        self, x: Any, columns: Callable[[Tensor], Tensor] | None = None, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return outputs and the covariance of ``columns`` of them, layer by layer."""
        part = self.block_covariance()
        with evaluation_mode(self.model):
            f_mu, jacobians = self.backend.jacobian_blocks(x, columns)
            f_var: Any = 0.0
            for i, jacobian in enumerate(jacobians):
                rows = jacobian.flatten(0, 1).unsqueeze(0) if joint else jacobian
                f_var = f_var + part(i, rows)
        return f_mu, f_var

    def _mc_probabilities(
        self, x: Any, n_samples: int, generator: torch.Generator | None
    ) -> Tensor:
        f_mu, f_var = self._linearised(x, contrast_root)
        contrasts = f_mu[:, :-1] - f_mu[:, -1:]
        samples = self._glm_functional_samples(contrasts, f_var, n_samples, generator=generator)
        logits = torch.nn.functional.pad(samples, (0, 1))
        return logits.softmax(-1).mean(0)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample ``(n_samples, batch, outputs)``; a singular covariance is no obstacle."""
        noise = torch.randn(
            n_samples, f_mu.shape[-1], dtype=f_mu.dtype, device=f_mu.device, generator=generator
        )
        if diagonal_output:
            return f_mu + f_var.diagonal(dim1=1, dim2=2).sqrt() * noise.unsqueeze(1)
        values, vectors = torch.linalg.eigh(f_var.double())
        root = (vectors * values.clamp(min=0).sqrt().unsqueeze(1)).to(f_mu.dtype)
        return f_mu + torch.einsum("nij,sj->sni", root, noise)

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
                set_weights(self.params, self.sample(1, generator)[0])
                outputs.append(self.model(X))
        return torch.stack(outputs)
