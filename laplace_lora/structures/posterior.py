"""`Posterior`: model, likelihood, structure and state put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.curvature.engine import Engine
from laplace_lora.data.sharding import whole
from laplace_lora.data.steps import Kind
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.models.inputs.batch_kinds import kind_of
from laplace_lora.models.inputs.image_rows import divides
from laplace_lora.models.last_layer_model import LastLayerModel
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.structures.base import GradientTerm, Precision, Structure
from laplace_lora.structures.settings import Settings
from laplace_lora.structures.state import PosteriorState


@dataclass(frozen=True, kw_only=True)
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
    source: LogitsModel
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
    def last_layer(self) -> LastLayerModel | None:
        """The model cut before its last layer, if the posterior is over a copy of that alone."""
        return self.model if isinstance(self.model, LastLayerModel) else None

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

    @property
    def leaves_examples_out(self) -> bool:
        """Whether an example's own curvature is known, and can be taken out of the posterior's.

        That of labels that were drawn is not, and that of observed ones is no curvature of the
        few classes that may stand for all.
        """
        return self.structure.sums_over_examples and not self.engine.estimates

    @cached_property
    def gradient_term(self) -> GradientTerm | None:
        """The evidence's gradient term; ``None`` before a pass over the data has measured it."""
        state, gradient = self.state, self.state.loss_gradient
        if gradient is not None and not self.needs_own_root:
            term = self.structure.gradient_term(state.curvature, gradient, state.displacement)
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

    @property
    def laplace_precision(self) -> Precision:
        """The same with gradients by prior and noise, as laplace-torch's, if they ask for some."""
        prior, scale = self.settings.prior_precision, self.scale
        if prior.requires_grad or scale.requires_grad:
            return self.structure.precision(self.state.curvature, prior, scale)
        return self.precision

    def with_settings(self, settings: Settings) -> Posterior:
        """Return the posterior with other settings."""
        return replace(self, state=self.state.with_settings(settings))

    def without_gradient_term(self) -> Posterior:
        """Return the posterior as if its gradient term were not known."""
        return replace(self, state=replace(self.state, loss_gradient=None, subspace=None))

    def current_weights(self) -> Tensor:
        """Return the model's trainable weights, ``(parameters,)``, on the posterior's device."""
        # A model may be spread over devices; the posterior is on one.
        parts = [whole(p).flatten() for p in self.engine.parameters]
        return torch.cat([part.to(self.device, self.dtype) for part in parts])

    def divides(self, batch: Any) -> bool:
        """Return whether every example of a batch has its own row of each tensor, see `divides`."""
        return divides(batch, self.source.config)

    def kind_of(self, batch: Any) -> Kind:
        """Return what decides how many passes a batch takes, see `kind_of`."""
        return kind_of(batch, self.source.config)

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
        check_generator(generator, self.device)
        size = (n_samples, len(self.mean))
        noise = torch.randn(size, dtype=self.dtype, device=self.device, generator=generator)
        return self.settings.covariance_scale**0.5 * self.precision.root_multiply(noise)


def check_generator(generator: torch.Generator | None, device: torch.device) -> None:
    """Refuse what is no generator, or is on another device.

    Args:
        generator: Source of samples; ``None`` for torch's own.
        device: Where they are drawn.

    Raises:
        TypeError: If it is something else, such as a seed.
        ValueError: If it is on another device.
    """
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r}; a seed goes into "
            "one, torch.Generator(device).manual_seed(seed)"
        )
    if generator.device != device:
        raise ValueError(
            f"the generator is on {generator.device}, the posterior on {device}; make it with "
            "torch.Generator(device)"
        )


def check_no_gradient(posterior: Posterior) -> None:
    """Refuse variances that would lack gradients by prior precision and noise that ask for them.

    Raises:
        RuntimeError: If its structure keeps rows, whose eigenpairs are computed without gradients.
    """
    settings = posterior.settings
    asks = settings.prior_precision.requires_grad or settings.sigma_noise.requires_grad
    if asks and posterior.structure.couples_groups and torch.is_grad_enabled():
        raise RuntimeError(
            f"the variances of a {posterior.kind} have no gradients by prior precision and noise, "
            "and these ask for some; detach them, or use KronLoraLaplace"
        )
