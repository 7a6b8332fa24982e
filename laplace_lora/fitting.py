"""`LoraPosterior`: what Laplace posteriors over adapter weights share.

Wrapping the model, fitting without losing an earlier posterior, and the device. The shape of the
precision belongs to `posterior`, predictions to `predictive`, tuning to `tuning`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader

from laplace_lora.accumulation import Snapshot, accumulate
from laplace_lora.adapters import trainable_only
from laplace_lora.checkpoint import Saving
from laplace_lora.curvature import LoraCurvature, LoraGGN
from laplace_lora.decomposed import LowRankKronDecomposed
from laplace_lora.fingerprint import check_identity, identity
from laplace_lora.guard import evaluation_mode
from laplace_lora.kron import LowRankKron
from laplace_lora.likelihoods import negative_log_likelihood
from laplace_lora.maps import wide_dtype
from laplace_lora.memory import MemoryEstimate, estimate_memory
from laplace_lora.models import LogitsModel
from laplace_lora.predictive import StreamingPredictive
from laplace_lora.tuning import PriorTuning


class LoraPosterior(PriorTuning, Saving, StreamingPredictive):
    """What the posteriors over all adapter weights share.

    Prior, curvature and evidence are kept in float32 or better, whatever the model's format.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"`` or ``"regression"``.
        target_ids: Answer tokens of a causal language model, see `LogitsModel`.
        modules: Which trainable modules the posterior covers: a regular expression searched for in
            their names, or a list of names or of whole parts of them. The others stay at their
            MAP values. ``None`` covers all.
        backend: `LoraGGN`, `LoraEF` or a subclass.
        backend_kwargs: Arguments of the backend, such as ``kfac_approx`` or ``stochastic``.
        **kwargs: laplace-torch's arguments, such as ``prior_precision``, ``sigma_noise`` and
            ``temperature``.

    Raises:
        ValueError: If nothing is trainable, a trainable tensor belongs to no linear map, or
            ``modules`` matches nothing.
        RuntimeError: If an adapter is merged or disabled, or several are active.
        TypeError: If the backend is not one of this package's.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        target_ids: Sequence[int] | Tensor | None = None,
        modules: str | Sequence[str] | None = None,
        backend: type[LoraCurvature] = LoraGGN,
        backend_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not (isinstance(backend, type) and issubclass(backend, LoraCurvature)):
            raise TypeError(f"backend must be LoraGGN, LoraEF or a subclass, got {backend!r}")
        self.modules = modules
        model = self._wrapped(model, target_ids)
        self.logits_model: Any = getattr(model, "source", model)
        kwargs = {"backend": backend, "backend_kwargs": dict(backend_kwargs or {}), **kwargs}
        with trainable_only(model, modules):
            super().__init__(model, likelihood, **kwargs)
            # Built now, so that what it cannot cover is refused before a fit.
            self.params = [block.parameter for block in self.backend.blocks]

    @staticmethod
    def _wrapped(model: nn.Module, target_ids: Sequence[int] | Tensor | None) -> nn.Module:
        if not isinstance(model, LogitsModel):
            return LogitsModel(model, target_ids=target_ids)
        if target_ids is not None:
            raise ValueError("the model is a LogitsModel already; give it the `target_ids`")
        return model

    @property
    def _dtype(self) -> torch.dtype:
        return wide_dtype(self.params)

    def fit(
        self,
        train_loader: DataLoader,
        override: bool = True,
        progress_bar: bool = False,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_every: int | None = None,
    ) -> None:
        """Fit the posterior at the model's current weights.

        One forward pass and ``C − 1`` backward passes a batch. The result does not depend on batch
        size or padding. If anything fails, the earlier posterior stays as it was.

        Where several processes share a loader (a `DistributedSampler`, or one that accelerate has
        prepared), all end with the posterior of all data; examples that the sampler repeats count
        once, and an error in one process ends all.

        Args:
            train_loader: Batches with labels: mappings with ``dict_key_y``, or pairs.
            override: Start anew; ``False`` adds these data to those fitted before.
            progress_bar: Show progress over the batches.
            checkpoint_dir: Where the sums so far are kept. A fit that was interrupted goes on
                there, after the batches it had seen, if the loader yields the same ones in the
                same order. The file is deleted at the end.
            checkpoint_every: Batches from one writing to the next, 100 by default.

        Raises:
            TypeError: If the loader has no ``dataset``, or a batch is neither mapping nor pair.
            ValueError: If the loader is empty, labels are missing or out of range, or what is kept
                in ``checkpoint_dir`` is damaged or belongs to another fit.
            FloatingPointError: If the loss or the curvature is not finite; names batch and layer.
            RuntimeError: If another process that shares the loader failed or had no examples.
        """
        if not hasattr(train_loader, "dataset"):
            raise TypeError(
                f"fit needs a DataLoader (an iterable with `dataset`), got "
                f"{type(train_loader).__name__}; wrap the data in torch.utils.data.DataLoader"
            )
        if checkpoint_every is not None and checkpoint_dir is None:
            raise ValueError("checkpoint_every needs checkpoint_dir")
        snapshot = None
        if checkpoint_dir is not None:
            snapshot = Snapshot(checkpoint_dir, checkpoint_every, self)
        sums = accumulate(self, train_loader, progress_bar, snapshot)
        curvature, loss, n = self._assembled(sums.state, sums.n), sums.loss, sums.n
        if self._fitted and not override:
            curvature = self._joined(curvature, n, self.curvature, self.n_data)
            loss, n = loss + self.loss, n + self.n_data
        self._install(curvature)
        self._settle(loss, n, self.backend.n_outputs)
        if snapshot is not None:
            snapshot.remove()

    def adopt(self, curvature: Any, n_data: int, train_loader: DataLoader | None = None) -> None:
        """Take over a curvature that was computed elsewhere, at the model's current weights.

        Args:
            curvature: What a fit sums: here of the mean loss times the number of examples.
            n_data: Number of training examples.
            train_loader: Training data with labels, for the log evidence; without it the evidence
                is not a number.

        Raises:
            ValueError: If there is no loader and the model does not say how many outputs it has.
        """
        loss, outputs = math.nan, getattr(self.model, "n_outputs", None)
        if train_loader is not None:
            loss = 0.0
            with evaluation_mode(self.model), torch.no_grad():
                for batch in train_loader:
                    x, y = self.labelled(batch)
                    f = self.model(x)
                    loss += negative_log_likelihood(f, y, self.likelihood).item()
                    outputs = f.shape[-1]
        if outputs is None:
            raise ValueError("the model does not say how many outputs it has; give `train_loader`")
        self._install(curvature)
        self._settle(loss, n_data, outputs)

    def _settle(self, loss: float, n_data: int, n_outputs: int) -> None:
        self.covariance_scale = self.likelihood_temperature = 1.0
        self.loss, self.n_data = loss, n_data
        self.n_outputs = self.model.output_size = n_outputs
        self.mean = parameters_to_vector(self.params).detach().to(self._dtype)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model and backend."""
        ids = self.logits_model.target_ids
        return {
            "likelihood": self.likelihood,
            "target_ids": None if ids is None else ids.tolist(),
            "modules": self.modules,
            "backend_kwargs": dict(self._backend_kwargs),
            "temperature": self.temperature,
            "dict_key_y": self.dict_key_y,
        }

    def marginals(self) -> dict[nn.Parameter, tuple[Tensor, Tensor]]:
        """Return posterior mean and standard deviation of every weight, by parameter.

        Correlations between weights are left out. A calibrated width counts.

        Raises:
            AttributeError: If the posterior has not been fitted.
        """
        self._check_H_init()
        sizes = [parameter.numel() for parameter in self.params]
        deviations = (self.covariance_scale * self.weight_variance()).sqrt().split(sizes)
        means = self.mean.split(sizes)
        return {
            p: (mean.view_as(p), std.view_as(p))
            for p, mean, std in zip(self.params, means, deviations, strict=True)
        }

    def merge(self, others: Sequence[LoraPosterior]) -> None:
        """Add what posteriors of the same model learnt from other data.

        The result is that of one fit on all the data; the prior stays, a calibration is undone.

        Args:
            others: Fitted posteriors of the same class, arguments and weights, on disjoint data.

        Raises:
            AttributeError: If one has not been fitted.
            ValueError: If one is of another class, or its arguments or model are others.
        """
        curvature, n, loss = self.curvature, self.n_data, self.loss
        mine = identity(self)
        for other in others:
            if type(other) is not type(self) or other.arguments() != self.arguments():
                raise ValueError("only posteriors of one class with the same arguments merge")
            check_identity(mine, identity(other))
            added = other.curvature.to(self._device)
            curvature = self._joined(curvature, n, added, other.n_data)
            n, loss = n + other.n_data, loss + other.loss
        self._install(curvature)
        self._settle(loss, n, self.n_outputs)

    def to(self, device: torch.device | str) -> LoraPosterior:
        """Move model and posterior to a device, in place, and return the posterior."""
        self.model.to(device)
        for name, value in vars(self).items():
            if isinstance(value, Tensor | LowRankKron | LowRankKronDecomposed):
                setattr(self, name, value.to(device))
        self._norms = None
        return self

    @property
    def _fitted(self) -> bool:
        return self.n_data > 0

    def estimate_memory(self, batch: Any) -> MemoryEstimate:
        """Estimate the memory of fits and predictions on batches like one, before the work.

        Runs the model forward on the first example. Print the result for advice.

        Args:
            batch: What the model takes.
        """
        return estimate_memory(self, batch)

    def curvature_size(self) -> int:
        """Return how many numbers the posterior's curvature holds."""
        return self.n_params

    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``."""
        raise NotImplementedError

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        """Add a batch's curvature to sums that start as ``None``; return its loss and the sums."""
        raise NotImplementedError

    def _tensors(self, state: Any) -> list[Tensor]:
        """Return the tensors that the sums consist of."""
        return [state]

    def _assembled(self, state: Any, n: int) -> Any:
        """Return the curvature that sums over ``n`` examples amount to."""
        return state

    def _joined(self, curvature: Any, n: int, other: Any, m: int) -> Any:
        """Return the curvature of ``n`` examples together with that of ``m`` others."""
        return curvature + other

    def _install(self, curvature: Any) -> None:
        """Make a curvature the posterior's; nothing changes if it is not finite."""
        raise NotImplementedError

    @property
    def curvature(self) -> Any:
        """Curvature of the summed loss: a `LowRankKron`, a diagonal or a dense matrix."""
        self._check_H_init()
        return self.H

    def labelled(self, batch: Any) -> tuple[Any, Tensor]:
        """Split a batch into what the model takes and labels on the posterior's device.

        Raises:
            ValueError: If labels are missing.
            TypeError: If the batch is neither mapping nor pair.
        """
        if isinstance(batch, Mapping):
            if self.dict_key_y not in batch:
                raise ValueError(
                    f"a batch has no {self.dict_key_y!r}, only {sorted(batch)}; add the "
                    "labels, or name their key with `dict_key_y`"
                )
            x, y = batch, batch[self.dict_key_y]
        elif isinstance(batch, Sequence) and len(batch) == 2:
            x, y = batch
        else:
            raise TypeError(
                f"a batch must be a mapping with {self.dict_key_y!r} or a pair of inputs "
                f"and labels, got {type(batch).__name__}"
            )
        y = torch.as_tensor(y).to(self._device)
        if self.likelihood == "regression":
            y = y.to(self._dtype)
            y = y.unsqueeze(-1) if y.ndim == 1 else y
        return x, y
