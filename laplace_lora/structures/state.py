"""The frozen state of a posterior, and its parts put together.

A fit, a tuning or a load makes a new state; nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.curvature.engine import Engine
from laplace_lora.data.sharding import whole
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.structures.base import GradientTerm, Precision, Structure
from laplace_lora.structures.settings import Settings
from laplace_lora.structures.subspace import Subspace


@dataclass(frozen=True)
class PosteriorState:
    """A posterior as numbers.

    Attributes:
        settings: Prior, noise and calibration.
        curvature: Curvature of the summed loss, of the structure's kind; ``None`` before a fit.
        mean: MAP weights, ``(parameters,)``; ``None`` before a fit.
        sizes: Numbers in each tensor.
        loss: Summed training loss.
        n_data: Number of training examples.
        n_outputs: Number of outputs.
        loss_gradient: Gradient of the summed loss at the MAP weights, ``(parameters,)``; ``None``
            where it is not known, as of files of earlier versions.
        subspace: Exact curvature along a few directions, for the evidence's gradient term; ``None``
            where it was not measured, or data were added since.
        frozen: Values of what the curvature does not cover at the fit, see `frozen_values`.
        adapter: Configuration of the adapter at the fit, see `adapter_settings`.
    """

    settings: Settings = field(default_factory=Settings)
    curvature: Any = None
    mean: Tensor | None = None
    sizes: tuple[int, ...] = ()
    loss: float = 0.0
    n_data: int = 0
    n_outputs: int = 0
    loss_gradient: Tensor | None = None
    subspace: Subspace | None = None
    frozen: Mapping[str, Tensor] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_fitted(self) -> bool:
        """Whether there is a curvature."""
        return self.curvature is not None

    @cached_property
    def squared_norms(self) -> Tensor:
        """Each tensor's ``‖θ − μ₀‖²``, float64, ``(tensors,)``."""
        assert self.mean is not None
        squares = (self.mean - self.settings.prior_mean).double().square()
        return torch.stack([part.sum() for part in squares.split(self.sizes)])

    @property
    def has_subspace(self) -> bool:
        """Whether there is a subspace, measured with the present prior mean."""
        if self.subspace is None:
            return False
        known, mean = self.subspace.prior_mean, self.settings.prior_mean
        return known is mean or torch.equal(known.expand_as(mean), mean)

    def with_settings(self, settings: Settings) -> PosteriorState:
        """Return the state with other settings."""
        state = replace(self, settings=settings)
        if settings.prior_mean is self.settings.prior_mean and "squared_norms" in vars(self):
            vars(state)["squared_norms"] = self.squared_norms
        return state


@dataclass(frozen=True)
class Posterior:
    """The parts of a posterior at one moment: model, likelihood, structure and state.

    Attributes:
        kind: Name of the posterior's class.
        arguments: Its constructor's arguments, but for model and backend.
        model: From a batch to outputs.
        source: The `LogitsModel` that answers for the user's model.
        engine: Jacobians and curvature of the model.
        objective: Likelihood.
        structure: How the curvature is held.
        state: The numbers.
        temperature: laplace-torch's temperature of the likelihood, in the curvature's scale.
        label_key: Key of the labels in a batch.
        device: Where the posterior is.
        differentiable: Whether gradients flow through predictions to the inputs.
        backend: Class of the backend, which says what curvature is summed.
    """

    kind: str
    arguments: dict[str, Any]
    model: nn.Module
    source: Any
    engine: Engine
    objective: Likelihood
    structure: Structure[Any, Any, Any]
    state: PosteriorState
    temperature: float
    label_key: str
    device: torch.device
    differentiable: bool
    backend: type[Any]

    @property
    def backend_name(self) -> str:
        """Module and name of the backend's class; a user's own may be called as one of ours."""
        return f"{self.backend.__module__}.{self.backend.__qualname__}"

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of curvature and predictions: the adapters', float32 at least."""
        return self.engine.dtype

    @property
    def settings(self) -> Settings:
        """Prior, noise and calibration."""
        return self.state.settings

    @property
    def mean(self) -> Tensor:
        """MAP weights, ``(parameters,)``."""
        assert self.state.mean is not None
        return self.state.mean

    @property
    def centre(self) -> Tensor:
        """The posterior's mean, ``(parameters,)``: the MAP weights, unless it was recentred."""
        shift = self.settings.shift
        return self.mean if shift is None else self.mean + shift

    @property
    def names(self) -> list[str]:
        """Names of the trainable tensors, in parameter order."""
        return self.engine.names

    @property
    def prior_by_tensor(self) -> Tensor:
        """Prior precision of each tensor, ``(tensors,)``, detached.

        Raises:
            ValueError: If there is one for each weight.
        """
        prior, tensors = self.settings.prior_precision.detach(), len(self.engine.blocks)
        if len(prior) not in (1, tensors):
            raise ValueError(
                "this takes a prior precision in all or for each tensor, and there is one for each "
                "weight; tune with another prior_structure ('scalar', 'matrix', 'layerwise') first"
            )
        return prior.expand(tensors)

    @property
    def needs_own_root(self) -> bool:
        """Whether the evidence's gradient term takes another curvature than the posterior's.

        That of a regression whose labels are drawn, or observed: residuals that an estimate of the
        curvature makes too large or too small are fitted too well, and as the noise falls the
        evidence rises without bound. A classifier's ends at zero, which is noticed.
        """
        return self.objective.has_noise and self.engine.estimates

    @cached_property
    def gradient_term(self) -> GradientTerm | None:
        """The evidence's gradient term; ``None`` before a pass over the data has measured it."""
        state, gradient = self.state, self.state.loss_gradient
        if gradient is not None and not self.needs_own_root:
            displacement = self.mean - self.settings.prior_mean
            term = self.structure.gradient_term(state.curvature, gradient, displacement)
            if term is not None:
                return term
        return state.subspace if state.has_subspace else None

    @property
    def scale(self) -> Tensor:
        """Factor of the curvature in the posterior precision, a scalar."""
        return 1 / self.settings.sigma_noise.square() / self.temperature

    @cached_property
    def precision(self) -> Precision:
        """The posterior precision, without gradients by prior and noise unless inputs have some."""
        prior, scale = self.settings.prior_precision, self.scale
        if not self.differentiable:  # who has differentiated the evidence predicts afterwards
            prior, scale = prior.detach(), scale.detach()
        return self.structure.precision(self.state.curvature, prior, scale)

    def with_settings(self, settings: Settings) -> Posterior:
        """Return the posterior with other settings."""
        return replace(self, state=self.state.with_settings(settings))

    def current_weights(self) -> Tensor:
        """Return the model's trainable weights, ``(parameters,)``, on the posterior's device."""
        # A model may be spread over devices; the posterior is on one.
        parts = [whole(p).flatten() for p in self.engine.parameters]
        return torch.cat([part.to(self.device, self.dtype) for part in parts])

    def by_example(self, batch: Any) -> Any:
        """Return a labelled batch in the form in which every row is an example."""
        return self.objective.by_example(batch, self.label_key)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Split a batch into what the model takes and labels, see `Likelihood.split`."""
        return self.objective.split(batch, self.label_key, self.device, self.dtype)

    def deviations(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Return samples around the centre with the calibrated width, less the centre.

        Shape ``(n_samples, parameters)``.
        """
        scale = self.settings.covariance_scale**0.5
        return scale * (self.sample(n_samples, generator) - self.centre)

    def sample(self, n_samples: int, generator: torch.Generator | None) -> Tensor:
        """Return samples of the weights before calibration, ``(n_samples, parameters)``."""
        size = (n_samples, len(self.mean))
        noise = torch.randn(size, dtype=self.dtype, device=self.device, generator=generator)
        return self.centre.reshape(1, -1) + self.precision.root_multiply(noise)


def expanded(values: Tensor, sizes: tuple[int, ...] | list[int]) -> Tensor:
    """Return one value per weight from one in all, one per tensor or one per weight.

    Args:
        values: ``(1,)``, ``(tensors,)`` or ``(parameters,)``.
        sizes: Numbers in each tensor.

    Raises:
        ValueError: If there are as many values as neither.
    """
    n = sum(sizes)
    if len(values) == 1:
        return values * torch.ones(n, device=values.device, dtype=values.dtype)
    if len(values) == n:
        return values
    if len(values) != len(sizes):
        raise ValueError(f"{len(values)} values for {len(sizes)} tensors of {n} numbers")
    pairs = zip(values, sizes, strict=True)
    return torch.cat([value * torch.ones(size).to(values) for value, size in pairs])
