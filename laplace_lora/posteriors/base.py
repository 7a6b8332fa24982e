"""`LoraLaplace`: a posterior over adapter weights, put together from its parts.

Engine, likelihood, structure and state; fitter, tuner and archive make new states, which are
installed here. There is no mathematics in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from laplace_lora.adapters.activation import point_out_frozen_adapter
from laplace_lora.adapters.peft_state import check_has_adapter
from laplace_lora.adapters.selection import is_chosen, trainable_only
from laplace_lora.curvature.backend import LoraCurvature
from laplace_lora.curvature.backends import LoraGGN
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.models.changes.turns import in_turn
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.models.wrapping import wrapped
from laplace_lora.posteriors.fitted import FittedLaplace
from laplace_lora.posteriors.memory import MemoryEstimate, estimate_memory
from laplace_lora.posteriors.summary import summary
from laplace_lora.posteriors.weights_watch import WeightsWatch
from laplace_lora.storage.adapter_start import AdapterStart
from laplace_lora.structures.base import Structure
from laplace_lora.structures.state import PosteriorState

Self = TypeVar("Self", bound="LoraLaplace")
OF_FACTORS = ("factor_rank", "low_rank_threshold", "residual")


class LoraLaplace(FittedLaplace):
    """What the posteriors over adapter weights share.

    Prior, curvature and evidence are kept in float32 or better, whatever the model's dtype.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``; ``"multilabel"`` for labels that do not exclude each
            other, see `likelihoods.multilabel`; ``"regression"``; ``"reward_modeling"`` for a model
            with one output that is fitted on preference pairs, see `data.pairs`;
            ``"language_modeling"`` for next-token prediction of a causal language model, see
            `TokenModel`; ``"token_classification"`` for a label per token, see
            `TokenClassifier`; or ``"question_answering"`` for answers that are parts of a text,
            see `SpanModel`.
        structure: How the curvature is held.
        target_ids: Answer tokens of a language model, see `LogitsModel`.
        mask_token_id: Token at which a masked language model answers (``tokenizer.mask_token_id``),
            if its configuration does not say.
        modules: Which trainable modules the posterior covers: a regular expression searched for in
            their names, or a list of names or of whole parts of them. The others stay at their
            MAP values. ``None`` covers all. ``"lora_B|classifier"``, or ``"lora_B"`` where no head
            is trained, takes half the factors, and none of wide inputs.
        uncovered: What becomes of trainable tensors that no Kronecker factor covers: ``"error"``
            names them, ``"diag"`` gives each the exact diagonal, see `Engine`.
        backend: `LoraGGN`, `LoraEF` or a subclass; ``None`` is `LoraGGN`, too.
        backend_kwargs: Arguments of the backend, such as ``kfac_approx`` or ``stochastic``.
        prior_mean: One number, one per weight, or the weights at the start of training, see
            `AdapterStart`.
        **kwargs: laplace-torch's arguments, such as ``prior_precision``, ``sigma_noise`` and
            ``temperature``.

    Raises:
        ValueError: If nothing is trainable, a trainable tensor is in no linear map, ``modules``
            or one of its names matches nothing, the likelihood is unknown or not the model's, a
            reward model has several outputs, or an argument of the backend would have no effect.
        RuntimeError: If an adapter is merged, unloaded or disabled, or several are active.
        TypeError: If the backend is not one of this package's.
    """

    @in_full_precision
    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        structure: Structure[Any, Any, Any],
        *,
        target_ids: Sequence[int] | Tensor | None = None,
        mask_token_id: int | None = None,
        modules: str | Sequence[str] | None = None,
        uncovered: str = "error",
        backend: type[LoraCurvature] | None = LoraGGN,
        backend_kwargs: Mapping[str, Any] | None = None,
        prior_mean: float | Tensor | AdapterStart = 0.0,
        **kwargs: Any,
    ) -> None:
        backend = LoraGGN if backend is None else backend
        if not (isinstance(backend, type) and issubclass(backend, LoraCurvature)):
            raise TypeError(f"backend must be LoraGGN, LoraEF or a subclass, got {backend!r}")
        misplaced = set(OF_FACTORS) & set(backend_kwargs or ())
        if misplaced:
            raise ValueError(
                f"{sorted(misplaced)} in backend_kwargs would have no effect; they are arguments "
                "of KronLoraLaplace and KronLoraLLLaplace themselves"
            )
        if kwargs.pop("asdl_fisher_kwargs", None):
            raise ValueError(
                "asdl_fisher_kwargs would have no effect; give the backend's arguments, such as "
                "kfac_approx, as backend_kwargs"
            )
        likelihood = str(getattr(likelihood, "value", likelihood))  # laplace-torch's enumeration
        if kwargs.get("damping"):
            raise ValueError("damping is not supported: it would have no effect on the posterior")
        if not isinstance(modules, str | None):
            modules = list(modules)
        self.modules = modules
        self.state = PosteriorState()
        self._weights_watch = WeightsWatch()
        self.structure = structure
        self.objective = likelihood_of(likelihood)
        self.logits_model = wrapped(self.objective, model, target_ids, mask_token_id)
        self.objective.check_outputs(self.logits_model.n_outputs)
        self.objective.check_problem(self.logits_model.problem_type)
        if self._key[0] == "lora":
            check_has_adapter(self.logits_model.model)
            if modules is None and not is_chosen():
                point_out_frozen_adapter(self.logits_model.model)
        self._latest = None
        options = {"uncovered": uncovered, **(backend_kwargs or {})}
        kwargs = {"backend": backend, "backend_kwargs": options, **kwargs}
        prior_precision = kwargs.pop("prior_precision", 1.0)  # perhaps one for each covered tensor
        model = self._differentiated(self.logits_model)
        with in_turn(model), trainable_only(model, modules):
            super().__init__(model, self.objective.laplace_name, **kwargs)
            self.likelihood = likelihood
            # Built now, so that what it cannot cover is refused before a fit.
            self.params = self.engine.parameters
        self.n_params, self.n_layers = sum(self.engine.sizes), len(self.params)
        self.structure = structure.bound(self.engine)
        self.prior_precision = prior_precision
        self.prior_mean = prior_mean

    def __repr__(self) -> str:
        """Return one line: class, likelihood, and on how many examples it was fitted."""
        fit = f"fitted on {self.n_data} examples" if self.state.is_fitted else "not fitted"
        return f"<{type(self).__name__}, {self.likelihood}, {self.n_params} weights, {fit}>"

    def __str__(self) -> str:
        """Return six lines: what it is and covers, prior, evidence, data, calibration."""
        evidence = float(self.log_marginal_likelihood().detach()) if self.state.is_fitted else None
        return summary(self.parts, evidence, self.tuning)

    @property
    def curvature(self) -> Any:
        """Curvature of the summed loss: Kronecker factors, a diagonal, a dense matrix or rows."""
        return self.structure.raw(self.fitted.state.curvature)

    @property
    def block_names(self) -> list[str]:
        """Names of the trainable tensors, in parameter order."""
        return self.engine.names

    def estimate_memory(self, batch: Any, n_examples: int | None = None) -> MemoryEstimate:
        """Estimate the memory of fits and predictions on batches like one, before the work.

        Runs the model forward on the first example. Print the result for advice.

        Args:
            batch: What the model takes.
            n_examples: Examples of the fit, where the posterior grows with them.

        Raises:
            TypeError: If it is no batch, such as a loader.
        """
        return estimate_memory(self.parts, batch, n_examples)

    def to(self: Self, device: torch.device | str) -> Self:
        """Move model and posterior to a device, in place, and return the posterior.

        Raises:
            TypeError: If it is a dtype: another one's posterior is another one's fit.
        """
        if isinstance(device, torch.dtype):
            raise TypeError(
                f"to() takes a device, got {device}; for a model in another dtype, make a new "
                "posterior and fit it"
            )
        device, state = torch.device(device), self.state
        self.model.to(device)
        self.state = replace(
            state,
            settings=state.settings.to(device),
            curvature=self.structure.to(state.curvature, device) if state.is_fitted else None,
            mean=None if state.mean is None else state.mean.to(device),
            loss_gradient=None if state.loss_gradient is None else state.loss_gradient.to(device),
            subspace=None if state.subspace is None else state.subspace.to(device),
        )
        return self

    def _differentiated(self, model: LogitsModel) -> nn.Module:
        """Return what laplace-torch takes for the model."""
        return model
