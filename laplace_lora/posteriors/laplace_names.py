"""`LaplaceNames`: the names that laplace-torch's code reads, writes and calls, over a frozen state.

Setting one of them installs a new state.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Tensor, nn

from laplace_lora.adapters.maps import wide_dtype
from laplace_lora.likelihoods.question_answering import halves, joined
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.parts import PosteriorParts
from laplace_lora.posteriors.state_values import SettingValue, StateValue
from laplace_lora.predictive.glm import Predictor
from laplace_lora.predictive.weight_sampling import sampled_outputs
from laplace_lora.storage.adapter_start import AdapterStart
from laplace_lora.structures.posterior import check_no_gradient
from laplace_lora.structures.settings import check_positive, expanded
from laplace_lora.tuning.evidence.marginal_likelihood import scatter


class LaplaceNames(PosteriorParts):
    """laplace-torch's names of a posterior.

    Attributes:
        covariance_scale: Factor of the predictive covariance, 1 unless tuned or calibrated.
        likelihood_temperature: Divides the logits before the softmax, 1 unless calibrated.
    """

    params: list[nn.Parameter]
    n_params: int
    n_layers: int

    loss = StateValue[float]()
    n_data = StateValue[int]()
    n_outputs = StateValue[int]()
    covariance_scale = SettingValue[float]()
    likelihood_temperature = SettingValue[float]()
    _prior_mean = SettingValue[Tensor]()
    _sigma_noise = SettingValue[Tensor]()

    @property
    def temperature(self) -> float:
        """laplace-torch's temperature of the likelihood, in the curvature's scale."""
        return self._temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        check_positive("temperature", value)
        self._temperature = value

    @property
    def _prior_precision(self) -> Tensor:
        return self.state.settings.prior_precision

    @_prior_precision.setter
    def _prior_precision(self, value: Tensor) -> None:
        self.structure.check_prior(len(value), self.n_layers, self.n_params)
        settings = self.state.settings.with_value("prior_precision", value)
        self.state = self.state.with_settings(settings)

    @property
    def prior_mean(self) -> Tensor:
        """The prior's mean, one number or ``(parameters,)``; takes what the constructor takes."""
        mean: Tensor = self._prior_mean
        return mean

    @prior_mean.setter
    def prior_mean(self, value: float | Tensor | AdapterStart) -> None:
        if isinstance(value, AdapterStart):
            value = value.vector(self.logits_model.get_submodule("model"), self.params)
        of_laplace_torch: Any = ParametricLaplace.prior_mean
        of_laplace_torch.fset(self, value)

    @property
    def mean(self) -> Tensor:
        """MAP weights, ``(parameters,)``; the prior mean before a fit."""
        mean = self.state.mean
        return self.state.settings.prior_mean if mean is None else mean

    @mean.setter
    def mean(self, value: Tensor) -> None:
        self.state = replace(self.state, mean=value)

    @property
    def H(self) -> Any:
        """Curvature of the summed loss as laplace-torch uses it; ``None`` before a fit."""
        curvature = self.state.curvature
        return None if curvature is None else self._as_H(curvature)

    @H.setter
    def H(self, value: Any) -> None:
        if value is not None:
            raise AttributeError("the curvature is set by fit, adopt, merge or load_state_dict")
        self.state = replace(self.state, curvature=None)

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P − log det P₀`` of the evidence, a float64 scalar."""
        self._check_H_init()
        curvature = self.state.curvature
        return self.structure.log_det_ratio(curvature, self.prior_precision, self._H_factor)

    @property
    def scatter(self) -> Tensor:
        """``(θ − μ₀)ᵀ P₀ (θ − μ₀)`` of the evidence, a float64 scalar."""
        self._check_H_init()
        return scatter(self.parts.state)

    @in_full_precision
    @torch.no_grad()
    def sample(self, n_samples: int = 100, generator: torch.Generator | None = None) -> Tensor:
        """Return samples of the weights, ``(n_samples, parameters)``.

        With the calibrated width, ``covariance_scale``, which `posterior_precision` is without.
        """
        posterior = self.fitted
        return posterior.centre + posterior.deviations(n_samples, generator)

    @in_full_precision
    def log_prob(self, value: Tensor, normalized: bool = True) -> Tensor:
        """Return the log density of weights under the posterior that `sample` draws from.

        Around the posterior's mean, which need not be the MAP, and with the calibrated width.

        Args:
            value: Weights, ``(parameters,)``.
            normalized: Whether to add what makes it a density.

        Returns:
            A scalar.
        """
        posterior, width = self.fitted, self.covariance_scale
        value = self.mean + (value - posterior.centre) / width**0.5
        density = super().log_prob(value, normalized)
        return density - 0.5 * self.n_params * math.log(width) if normalized else density

    @property
    def log_det_posterior_precision(self) -> Tensor:
        """``log det P``, a float64 scalar."""
        prior = expanded(self.prior_precision, self.engine.sizes)
        return self.log_det_ratio + prior.double().log().sum()

    @in_full_precision
    def square_norm(self, value: Tensor) -> Tensor:
        """Return ``(θ − θ_MAP)ᵀ P (θ − θ_MAP)`` of a weight vector, a scalar."""
        gap, posterior = value - self.mean, self.fitted
        prior = expanded(self.prior_precision, posterior.engine.sizes)
        product = self.structure.product(posterior.state.curvature, gap.unsqueeze(0))[0]
        norm: Tensor = posterior.scale * (gap @ product) + gap.square() @ prior
        return norm

    @in_full_precision
    def functional_variance(self, Js: Tensor) -> Tensor:
        """Return ``J P⁻¹ Jᵀ`` for ``J`` of shape ``(batch, outputs, parameters)``.

        Raises:
            RuntimeError: If prior precision or noise ask for gradients by which it has none.
            ValueError: If these are not Jacobians by the posterior's weights, on its device.
        """
        posterior = self.fitted
        self._check_jacobians(Js)
        check_no_gradient(posterior)
        return posterior.laplace_precision.covariance(Js.split(posterior.engine.sizes, -1))

    @in_full_precision
    def functional_covariance(self, Js: Tensor) -> Tensor:
        """Return ``J P⁻¹ Jᵀ`` between all examples, ``(batch · outputs,)`` squared."""
        return self.functional_variance(Js.flatten(0, 1).unsqueeze(0)).squeeze(0)

    @property
    def _device(self) -> torch.device:
        # laplace-torch's is that of the first parameter, which may be offloaded.
        return self.logits_model.device

    @property
    def _dtype(self) -> torch.dtype:
        return wide_dtype(self.params)

    def _as_H(self, curvature: Any) -> Any:
        """Return a fitted state's curvature as laplace-torch uses it."""
        return curvature

    def _init_H(self) -> None:
        """Do nothing: the state starts without a curvature."""

    @in_full_precision
    def _glm_predictive_distribution(
        self, X: Any, joint: bool = False, diagonal_output: bool = False
    ) -> tuple[Tensor, Tensor]:
        return Predictor(self.fitted).distribution(X, joint, diagonal_output)

    def _glm_functional_samples(
        self,
        f_mu: Tensor,
        f_var: Tensor,
        n_samples: int,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        predictor = Predictor(self.fitted)
        return predictor.output_samples(f_mu, f_var, n_samples, diagonal_output, generator)

    def _nn_functional_samples(
        self, X: Any, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        return sampled_outputs(self.fitted, X, n_samples, generator)

    functional_samples = in_full_precision(ParametricLaplace.functional_samples)

    @in_full_precision
    def predictive_samples(
        self,
        x: Any,
        pred_type: str = "glm",
        n_samples: int = 100,
        diagonal_output: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return what samples of the outputs stand for, ``(n_samples, batch, outputs)``.

        Probabilities of classes, of each label where these are independent, of the texts of pairs,
        and of tokens as start and as end; of single rewards, regressions and language models the
        outputs themselves. Arguments are those of `functional_samples`.
        """
        outputs = self.functional_samples(x, pred_type, n_samples, diagonal_output, generator)
        objective = self.fitted.objective
        if objective.predicts_tokens:
            return outputs  # logits of the scored tokens
        if objective.has_spans:
            return joined(halves(outputs).softmax(-1))
        readout = objective.readout(x)
        return readout.under(outputs) if readout.is_softmax else outputs
