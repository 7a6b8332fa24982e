"""Predictions of a Gaussian posterior over adapter weights, streamed tensor by tensor.

`StreamingPredictive` is the half of a posterior class that answers ``la(batch)``, with the
linearised (GLM) predictive from one forward pass. The sampling (NN) predictive belongs to
`sampling`, fitting to `fitting`, the way from logits to probabilities to `links`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature.backends import LoraCurvature
from laplace_lora.data.pairs import REWARD_MODELING, is_pair
from laplace_lora.likelihoods import links
from laplace_lora.likelihoods.roots import LANGUAGE_MODELING, contrast_root, difference_root
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.predictive.weight_sampling import WeightSampling

Gram = tuple[Tensor, Tensor]


class StreamingPredictive(WeightSampling):
    """Predictive half of a posterior; subclasses say what each tensor's covariance is."""

    backend: LoraCurvature

    def block_covariance(self) -> Callable[[int, Tensor], Tensor]:
        """Return a function from a tensor's index and Jacobian to its part of the covariance.

        The function takes ``(batch, outputs, *shape)`` and returns ``J P⁻¹ Jᵀ``, ``(batch, outputs,
        outputs)``.
        """
        raise NotImplementedError

    def covariance_of(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, ``(batch, outputs, outputs)``, before ``covariance_scale``.

        Args:
            jacobians: Rows ``(batch, outputs, *shape)`` of each tensor, in parameter order.
        """
        part = self.block_covariance()
        covariance: Any = 0.0
        for i, jacobian in enumerate(jacobians):
            covariance = covariance + part(i, jacobian)
        return covariance

    def block_grams(self) -> Callable[[int, Tensor], list[Gram]]:
        """Return a function from a tensor's index and Jacobian to its covariance as function of δ.

        The function takes ``(batch, outputs, *shape)`` and returns pairs of the curvature's
        eigenvalues ``e``, ``(K,)``, and products ``M``, ``(batch, outputs, outputs, K)``, with
        ``J P⁻¹ Jᵀ = Σ_k M_k / (e_k + δ)`` summed over the pairs.
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

        A reward model answers single texts like a regression and pairs (see `preferences`) like a
        classifier: the probabilities that the rejected and that the chosen text wins, from the
        difference of the rewards alone.

        Args:
            x: Batch that the model takes.
            pred_type: ``"glm"`` (linearised) or ``"nn"`` (sampled weights, ``link_approx="mc"``).
            joint: For regression, covariances between the examples as well.
            link_approx: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``.
            n_samples: Samples for ``"mc"``.
            diagonal_output: Ignore covariances between outputs (``"mc"`` and regression).
            generator: Source of the samples, on the posterior's device.
            fitting: Of laplace-torch: for reward models, insist on pairs.

        Returns:
            Class probabilities ``(batch, classes)``. For regression mean ``(batch, outputs)`` and
            covariance ``(batch, outputs, outputs)``; if joint ``(batch·outputs,)`` and its square;
            if ``pred_type="nn"`` mean and variance of the samples, ``(batch, outputs)`` each.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If an option is unknown, or the generator is on another device.
        """
        self._check_H_init()
        self._check_options(pred_type, link_approx, generator)
        prefers = self.likelihood == REWARD_MODELING and (fitting or is_pair(x))
        classifies = self.likelihood == "classification" or prefers
        if pred_type == "nn":
            if classifies and link_approx != "mc":
                raise ValueError("pred_type='nn' samples weights; choose link_approx='mc'")
            outputs = self._nn_functional_samples(x, n_samples, generator)
            return outputs.softmax(-1).mean(0) if classifies else (outputs.mean(0), outputs.var(0))
        if not classifies:
            mean, covariance = self._glm_predictive_distribution(x, joint=joint)
            return mean, covariance.diagonal(dim1=-2, dim2=-1) if (
                diagonal_output and not joint
            ) else covariance
        if prefers:
            mean, variance = (m.unsqueeze(-1) for m in self.reward_difference(x))
            noise = self._noise(n_samples, mean, generator) if link_approx == "mc" else None
            covariance = variance.unsqueeze(-1)
            return links.log_probabilities(mean, covariance, link_approx, noise).exp()
        if link_approx == "mc" and not diagonal_output:
            mean, covariance = self._linearised(x, contrast_root)
            contrasts = mean[:, :-1] - mean[:, -1:]
            noise = self._noise(n_samples, contrasts, generator)
            return links.sampled(contrasts, covariance, noise).exp()
        mean, covariance = self._glm_predictive_distribution(x)
        if link_approx == "mc":
            samples = self._glm_functional_samples(mean, covariance, n_samples, True, generator)
            return samples.softmax(-1).mean(0)
        return links.log_probabilities(mean, covariance, link_approx, None).exp()

    def reward_difference(self, pairs: Any) -> tuple[Tensor, Tensor]:
        """Return the linearised posterior of ``r_chosen − r_rejected``.

        The variance is that of the difference of the Jacobians: what the two rewards share, such
        as a common shift, cancels.

        Args:
            pairs: Batch of pairs, see `preferences`.

        Returns:
            Mean and variance, ``(batch,)`` each.

        Raises:
            AttributeError: If the posterior has not been fitted.
            ValueError: If the batch holds no pairs.
        """
        self._check_H_init()
        if not is_pair(pairs):
            raise ValueError("a difference needs pairs: 'input_ids_chosen', 'input_ids_rejected'")
        mean, covariance = self._linearised(pairs, difference_root)
        return mean[:, 1] - mean[:, 0], covariance.flatten()

    def gram_blocks(self, x: Any) -> tuple[Tensor, Iterator[tuple[int, list[Gram]]]]:
        """Return the mean of the logits, and their covariance as a function of the prior.

        One pass serves every prior precision: the covariance is the sum of ``M_k / (e_k + δ_i)``
        over the grams of all tensors ``i``, before ``covariance_scale``.

        Args:
            x: Batch that the model takes.

        Returns:
            Mean ``(batch, outputs)``, and an iterator over ``(i, grams)`` in parameter order, see
            `block_grams`. For pairs the one output is the difference of their rewards.
        """
        grams = self.block_grams()
        mean, jacobians = self._judged(x)
        return mean, ((i, grams(i, jacobian)) for i, jacobian in enumerate(jacobians))

    def _judged(self, x: Any) -> tuple[Tensor, Iterator[Tensor]]:
        """Return what the likelihood judges, ``(batch, outputs)``, and its Jacobians."""
        prefers = self.likelihood == REWARD_MODELING
        with evaluation_mode(self.model):
            f, jacobians = self.backend.jacobian_blocks(x, difference_root if prefers else None)
        return f[:, 1:] - f[:, :1] if prefers else f, jacobians

    def _check_options(
        self, pred_type: str, link_approx: str, generator: torch.Generator | None
    ) -> None:
        if self.likelihood == LANGUAGE_MODELING:
            raise ValueError(
                "a language model's posterior predicts tokens through `laplace_lora.generation`: "
                "`score(la, batch)` or `generate(la, inputs)`"
            )
        if pred_type not in ("glm", "nn"):
            raise ValueError(f"pred_type must be 'glm' or 'nn', got {pred_type!r}")
        if link_approx not in links.LINKS:
            raise ValueError(f"link_approx must be one of {links.LINKS}, got {link_approx!r}")
        if generator is not None and generator.device != self._device:
            raise ValueError(
                f"the generator is on {generator.device}, the posterior on {self._device}; make it "
                "with torch.Generator(device)"
            )

    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        self._check_H_init()
        mean, covariance = self._linearised(X, joint=joint)
        if joint:
            return mean.flatten(), covariance.squeeze(0)
        return mean, covariance.diagonal(dim1=1, dim2=2) if diagonal_output else covariance

    def _linearised(
        self, x: Any, columns: Callable[[Tensor], Tensor] | None = None, joint: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return outputs, and the covariance of ``columns`` of them."""
        with evaluation_mode(self.model):
            mean, covariance = self._moments(x, columns, joint)
        heat = self.likelihood_temperature
        return mean / heat, covariance * (self.covariance_scale / heat**2)

    def _moments(
        self, x: Any, columns: Callable[[Tensor], Tensor] | None, joint: bool
    ) -> tuple[Tensor, Tensor]:
        if self.enable_backprop:
            return self._differentiable_moments(x, columns, joint)
        mean, jacobians = self.backend.jacobian_blocks(x, columns)
        rows = (jacobian.flatten(0, 1)[None] if joint else jacobian for jacobian in jacobians)
        return mean, self.covariance_of(rows)

    @torch.enable_grad()
    def _differentiable_moments(
        self, x: Any, columns: Callable[[Tensor], Tensor] | None, joint: bool
    ) -> tuple[Tensor, Tensor]:
        jacobians, mean = self.backend.jacobians(x, enable_backprop=True)
        if columns is not None:
            jacobians = torch.einsum("rnc,ncp->nrp", columns(mean.detach()), jacobians)
        rows = jacobians.flatten(0, 1)[None] if joint else jacobians
        return mean, self.functional_variance(rows)

    def _noise(self, n_samples: int, mean: Tensor, generator: torch.Generator | None) -> Tensor:
        size = (n_samples, mean.shape[-1])
        return torch.randn(size, dtype=mean.dtype, device=mean.device, generator=generator)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        noise = self._noise(n_samples, f_mu, generator)
        if diagonal_output:
            return f_mu + f_var.diagonal(dim1=1, dim2=2).sqrt() * noise.unsqueeze(1)
        return links.gaussian_samples(f_mu, f_var, noise)
