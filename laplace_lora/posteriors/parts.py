"""`PosteriorParts`: what a posterior is put together from, and the parts at one moment."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import nn

from laplace_lora.curvature.backend import LoraCurvature
from laplace_lora.curvature.engine import Engine
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.posteriors.weights_watch import WeightsWatch
from laplace_lora.structures.base import Structure
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.state import PosteriorState


class PosteriorParts(ParametricLaplace):
    """laplace-torch's posterior with parts of its own; what they are, `LoraLaplace` decides.

    Attributes:
        state: Everything that a fit, a tuning or a load changes; replaced as a whole.
        structure: How the curvature is held.
        objective: Likelihood of the outputs.
        logits_model: The `LogitsModel` that answers for the user's model.
        modules: Which trainable modules are covered, see `LoraLaplace`.
    """

    state: PosteriorState
    structure: Structure[Any, Any, Any]
    objective: Likelihood
    logits_model: LogitsModel
    modules: str | list[str] | None
    model: nn.Module
    likelihood: str
    dict_key_y: str
    enable_backprop: bool
    _latest: tuple[Posterior, tuple[float, str, torch.device, bool], list[int]] | None
    _weights_watch: WeightsWatch

    @property
    def engine(self) -> Engine:
        """Jacobians and curvature of the model."""
        backend = self.backend
        assert isinstance(backend, LoraCurvature)
        return backend.engine

    @property
    def parts(self) -> Posterior:
        """The posterior's parts at this moment, fitted or not."""
        # All that may change after construction; a precision is kept for as long as none does.
        key = (self.temperature, self.dict_key_y, self._device, self.enable_backprop)
        latest = self._latest
        versions = self.state.settings.versions
        if latest is not None and latest[2] != versions:
            self.state = replace(self.state)  # without what it has computed from them
        if latest is None or latest[0].state is not self.state or latest[1] != key:
            posterior = Posterior(
                kind=type(self).__name__,
                arguments=self.arguments(),
                model=self._predicting_model(),
                source=self.logits_model,
                engine=self.engine,
                objective=self.objective,
                structure=self.structure,
                state=self.state,
                temperature=self.temperature,
                label_key=self.dict_key_y,
                device=self._device,
                differentiable=self.enable_backprop,
                backend=self._backend_cls,
            )
            self._latest = latest = (posterior, key, versions)
        return latest[0]

    @property
    def fitted(self) -> Posterior:
        """The posterior's parts at this moment.

        Raises:
            AttributeError: If it has not been fitted.
            RuntimeError: If the model's weights have changed since.
        """
        self._check_H_init()
        self._weights_watch.check(self.parts)
        return self.parts

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model and backend."""
        ids = self.logits_model.target_ids
        structure = self.structure.arguments()
        options = {k: v for k, v in self._backend_kwargs.items() if k not in structure}
        mask = self.logits_model.mask_token_id
        return {
            "likelihood": self.likelihood,
            "target_ids": None if ids is None else ids.tolist(),
            **({} if mask is None else {"mask_token_id": mask}),
            "modules": self.modules,
            "backend_kwargs": options,
            "temperature": self.temperature,
            "dict_key_y": self.dict_key_y,
            **structure,
        }

    def _predicting_model(self) -> nn.Module:
        """Return what runs in predictions."""
        return self.model

    def _check_H_init(self) -> None:
        if not self.state.is_fitted:
            raise AttributeError("Laplace not fitted. Run fit() first.")
