"""`LoraLaplace`: a posterior over adapter weights, put together from its parts.

Engine, likelihood, structure and state; fitter, tuner and archive make new states, which are
installed here. There is no mathematics in this file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_lora.adapters.peft_state import check_has_adapter
from laplace_lora.adapters.selection import trainable_only
from laplace_lora.curvature.backends import LoraCurvature, LoraGGN
from laplace_lora.curvature.engine import Engine
from laplace_lora.data.loaders import chained
from laplace_lora.fitting.fitter import Fitter
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.autocast import in_full_precision
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.models.token_model import TokenModel
from laplace_lora.posteriors.memory import MemoryEstimate, estimate_memory
from laplace_lora.posteriors.saved import SavedLaplace
from laplace_lora.posteriors.summary import summary
from laplace_lora.posteriors.weights_watch import WeightsWatch
from laplace_lora.storage.adapter_start import AdapterStart
from laplace_lora.structures.base import Structure
from laplace_lora.structures.state import Posterior, PosteriorState

Self = TypeVar("Self", bound="LoraLaplace")


class LoraLaplace(SavedLaplace):
    """What the posteriors over adapter weights share.

    Prior, curvature and evidence are kept in float32 or better, whatever the model's dtype.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``; ``"regression"``; ``"reward_modeling"`` for a model with
            one output that is fitted on preference pairs, see `data.pairs`; or
            ``"language_modeling"`` for next-token prediction of a causal language model, see
            `TokenModel`.
        structure: How the curvature is held.
        target_ids: Answer tokens of a causal language model, see `LogitsModel`.
        modules: Which trainable modules the posterior covers: a regular expression searched for in
            their names, or a list of names or of whole parts of them. The others stay at their
            MAP values. ``None`` covers all.
        uncovered: What becomes of trainable tensors that no Kronecker factor covers: ``"error"``
            names them, ``"diag"`` gives each the exact diagonal, see `Engine`.
        backend: `LoraGGN`, `LoraEF` or a subclass.
        backend_kwargs: Arguments of the backend, such as ``kfac_approx`` or ``stochastic``.
        prior_mean: One number, one per weight, or the weights at the start of training, see
            `AdapterStart`.
        **kwargs: laplace-torch's arguments, such as ``prior_precision``, ``sigma_noise`` and
            ``temperature``.

    Raises:
        ValueError: If nothing is trainable, a trainable tensor is in no linear map, ``modules``
            matches nothing, the likelihood is unknown, or a reward model has several outputs.
        RuntimeError: If an adapter is merged, unloaded or disabled, or several are active.
        TypeError: If the backend is not one of this package's.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        structure: Structure[Any, Any, Any],
        *,
        target_ids: Sequence[int] | Tensor | None = None,
        modules: str | Sequence[str] | None = None,
        uncovered: str = "error",
        backend: type[LoraCurvature] = LoraGGN,
        backend_kwargs: Mapping[str, Any] | None = None,
        prior_mean: float | Tensor | AdapterStart = 0.0,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(backend, type) and issubclass(backend, LoraCurvature)):
            raise TypeError(f"backend must be LoraGGN, LoraEF or a subclass, got {backend!r}")
        if kwargs.get("damping"):
            raise ValueError("damping is not supported: it would have no effect on the posterior")
        self.modules = modules
        self.state = PosteriorState()
        self._weights_watch = WeightsWatch()
        self.structure = structure
        self.objective = likelihood_of(likelihood)
        wrap = TokenModel.around if self.objective.predicts_tokens else LogitsModel.wrap
        self.logits_model = wrap(model, target_ids)
        self.objective.check_outputs(self.logits_model.n_outputs)
        if self._key[0] == "lora":
            check_has_adapter(self.logits_model.model)
        self._latest: tuple[Posterior, tuple[float, str, torch.device, bool]] | None = None
        options = {"uncovered": uncovered, **(backend_kwargs or {})}
        kwargs = {"backend": backend, "backend_kwargs": options, **kwargs}
        model = self._differentiated(self.logits_model)
        with trainable_only(model, modules):
            super().__init__(model, self.objective.laplace_name, **kwargs)
            self.likelihood = likelihood
            # Built now, so that what it cannot cover is refused before a fit.
            self.params = self.engine.parameters
        self.structure = structure.bound(self.engine)
        if isinstance(prior_mean, AdapterStart):
            prior_mean = prior_mean.vector(self.logits_model.get_submodule("model"), self.params)
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
        if latest is None or latest[0].state is not self.state or latest[1] != key:
            posterior = Posterior(
                type(self).__name__,
                self.arguments(),
                self._predicting_model(),
                self.logits_model,
                self.engine,
                self.objective,
                self.structure,
                self.state,
                *key,
            )
            self._latest = latest = (posterior, key)
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

    @property
    def curvature(self) -> Any:
        """Curvature of the summed loss: Kronecker factors, a diagonal, a dense matrix or rows."""
        return self.structure.raw(self.fitted.state.curvature)

    @property
    def block_names(self) -> list[str]:
        """Names of the trainable tensors, in parameter order."""
        return self.engine.names

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model and backend."""
        ids = self.logits_model.target_ids
        structure = self.structure.arguments()
        options = {k: v for k, v in self._backend_kwargs.items() if k not in structure}
        return {
            "likelihood": self.likelihood,
            "target_ids": None if ids is None else ids.tolist(),
            "modules": self.modules,
            "backend_kwargs": options,
            "temperature": self.temperature,
            "dict_key_y": self.dict_key_y,
            **structure,
        }

    @in_full_precision
    def fit(
        self,
        train_loader: DataLoader[Any],
        override: bool = True,
        progress_bar: bool = False,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
        evidence_correction: bool | None = None,
    ) -> None:
        """Fit the posterior at the model's current weights.

        One forward pass and ``C − 1`` backward passes per batch, and once more if eigenvalues are
        corrected; for language models one backward pass, which draws labels from torch's global
        generator. The result does not depend on batch size or padding. If anything fails, the
        earlier posterior stays as it was.

        Where several processes share a loader (a `DistributedSampler`, or one that accelerate has
        prepared), all end with the posterior of all data; examples that the sampler repeats count
        once, and an error in one process ends all.

        Args:
            train_loader: Batches with labels: mappings with ``dict_key_y``, or pairs. For a reward
                model preference pairs, see `as_pairs`, which need no labels.
            override: Start anew; ``False`` adds these data to those fitted before.
            progress_bar: Show progress over the batches.
            checkpoint_dir: Where the sums so far are kept. A fit that was interrupted goes on
                there, after the batches it had seen, if the loader yields the same ones in the
                same order. The files, one per pass, are deleted at the end.
            checkpoint_every: Batches from one writing to the next, 100 by default.
            evidence_correction: When to measure what the evidence gains because trained weights
                are no mode of the prior, see `Subspace`, which takes one more pass over the data.
                ``None``: when an evidence is first asked for. ``True``: now, so that files hold it.
                ``False``: not unless `optimize_prior_precision` is given ``correction=True``; a
                prior tuned without it is far too weak where weights were trained without it.

        Raises:
            TypeError: If the loader has no ``dataset``, or a batch is neither mapping nor pair.
            ValueError: If the loader is empty, labels are missing or out of range, passes see
                different numbers of examples, or what is kept in ``checkpoint_dir`` is damaged or
                is of another fit.
            FloatingPointError: If the loss or the curvature is not finite; names batch and layer.
            RuntimeError: If another process that shares the loader failed or had no examples.
        """
        fitter = Fitter(self.parts if override or not self.state.is_fitted else self.fitted)
        options = (override, progress_bar, checkpoint_dir, checkpoint_every, evidence_correction)
        alone = override or not self.state.is_fitted
        loaders = [train_loader] if alone else [self._train_loader, train_loader]
        self._install(fitter.fit(train_loader, *options))
        self._train_loader = chained(loaders)
        self._leaves_correction_out = evidence_correction is False

    def adopt(self, curvature: Any, n_data: int, train_loader: Iterable[Any] | None = None) -> None:
        """Take over a curvature that was computed elsewhere, at the model's current weights.

        Args:
            curvature: What `curvature` would return: of the mean loss times the number of examples.
            n_data: Number of training examples.
            train_loader: Training data with labels, for the log evidence; without it the evidence
                is not a number.

        Raises:
            ValueError: If there is no loader and the model does not say how many outputs it has.
        """
        self._install(Fitter(self.parts).adopt(curvature, n_data, train_loader))

    def merge(self, others: Sequence[LoraLaplace]) -> None:
        """Add what posteriors of the same model learnt from other data.

        The result is that of one fit on all the data; the prior stays, a calibration is undone.

        Args:
            others: Fitted posteriors of the same class, arguments and weights, on disjoint data.

        Raises:
            AttributeError: If one has not been fitted.
            ValueError: If one is of another class, or its arguments or model are others.
        """
        loaders = [posterior._train_loader for posterior in (self, *others)]
        self._install(Fitter(self.fitted).merge([other.fitted for other in others]))
        self._train_loader = chained(loaders)

    def estimate_memory(self, batch: Any, n_examples: int | None = None) -> MemoryEstimate:
        """Estimate the memory of fits and predictions on batches like one, before the work.

        Runs the model forward on the first example. Print the result for advice.

        Args:
            batch: What the model takes.
            n_examples: Examples of the fit, where the posterior grows with them.
        """
        return estimate_memory(self.parts, batch, n_examples)

    def curvature_size(self) -> int:
        """Return how many numbers the posterior's curvature holds."""
        return self.structure.size(self.engine, self.state.curvature)

    def to(self: Self, device: torch.device | str) -> Self:
        """Move model and posterior to a device, in place, and return the posterior."""
        self.model.to(device)
        device, state = torch.device(device), self.state
        self.state = replace(
            state,
            settings=state.settings.to(device),
            curvature=self.structure.to(state.curvature, device) if state.is_fitted else None,
            mean=None if state.mean is None else state.mean.to(device),
            loss_gradient=None if state.loss_gradient is None else state.loss_gradient.to(device),
            subspace=None if state.subspace is None else state.subspace.to(device),
        )
        return self

    def _install(self, state: PosteriorState) -> None:
        self.state, self._latest = state, None
        self._train_loader, self.tuning, self._leaves_correction_out = None, None, False
        self.model.output_size = state.n_outputs  # type: ignore[assignment]

    def _differentiated(self, model: LogitsModel) -> nn.Module:
        """Return what laplace-torch takes for the model."""
        return model

    def _predicting_model(self) -> nn.Module:
        """Return what runs in predictions."""
        return self.model
