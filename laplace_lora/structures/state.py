"""The frozen state of a posterior.

A fit, a tuning or a load makes a new state; nothing is changed in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from laplace_lora.structures.settings import Settings
from laplace_lora.structures.subspace import Subspace


@dataclass(frozen=True, kw_only=True)
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
        adapter: Configuration of the adapter at the fit, see `function_settings`.
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

    @property
    def displacement(self) -> Tensor:
        """How far the MAP weights are from the prior's mean, ``θ − μ₀``, ``(parameters,)``."""
        assert self.mean is not None
        return self.mean - self.settings.prior_mean

    @cached_property
    def squared_norms(self) -> Tensor:
        """Each tensor's ``‖θ − μ₀‖²``, float64, ``(tensors,)``."""
        squares = self.displacement.double().square()
        return torch.stack([part.sum() for part in squares.split(self.sizes)])

    @property
    def has_subspace(self) -> bool:
        """Whether there is a subspace, measured with the present prior mean."""
        if self.subspace is None:
            return False
        known, mean = self.subspace.prior_mean, self.settings.prior_mean
        # Either may be a number where the other has one for each weight.
        return known is mean or bool((known.to(mean.device) == mean).all())

    def with_settings(self, settings: Settings) -> PosteriorState:
        """Return the state with other settings."""
        state = replace(self, settings=settings)
        if settings.prior_mean is self.settings.prior_mean and "squared_norms" in vars(self):
            vars(state)["squared_norms"] = self.squared_norms
        return state
