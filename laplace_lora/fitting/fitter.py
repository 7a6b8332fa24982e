"""`Fitting`: the part of a posterior class that turns training data into its curvature.

Fitting without losing an earlier posterior, adding data, merging posteriors. How batches are passed
over belongs to `accumulation`, the shape of the curvature to the posterior classes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from laplace.baselaplace import ParametricLaplace
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_lora.adapters.maps import wide_dtype
from laplace_lora.curvature.backends import LoraCurvature
from laplace_lora.data.labels import token_labels
from laplace_lora.data.pairs import REWARD_MODELING, as_pairs
from laplace_lora.fitting.accumulation import accumulate
from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.fitting.snapshots import Snapshot
from laplace_lora.likelihoods.roots import LANGUAGE_MODELING, negative_log_likelihood
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.storage.fingerprint import check_identity, identity


class Fitting(ParametricLaplace):
    """Fitting half of a posterior; subclasses say what a batch adds and what the sums amount to."""

    backend: LoraCurvature
    params: list[nn.Parameter]
    loss: float
    n_data: int
    covariance_scale: float
    likelihood_temperature: float

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

        One forward pass and ``C − 1`` backward passes a batch, and once more if eigenvalues are
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
                same order. The files, one a pass, are deleted at the end.
            checkpoint_every: Batches from one writing to the next, 100 by default.

        Raises:
            TypeError: If the loader has no ``dataset``, or a batch is neither mapping nor pair.
            ValueError: If the loader is empty, labels are missing or out of range, passes see
                different numbers of examples, or what is kept in ``checkpoint_dir`` is damaged or
                belongs to another fit.
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
        snapshots: list[Snapshot] = []

        def summed(one: Pass) -> Sums:
            snapshot = None
            if checkpoint_dir is not None:
                snapshot = Snapshot(checkpoint_dir, checkpoint_every, self, one)
                snapshots.append(snapshot)
            return accumulate(self, one, train_loader, progress_bar, snapshot)

        self._announce(train_loader)
        sums = summed(self._pass())
        curvature, loss, n = self._assembled(sums.state, sums.n), sums.loss, sums.n
        if self._fitted and not override:
            curvature = self._joined(curvature, n, self.curvature, self.n_data)
            loss, n = loss + self.loss, n + self.n_data
        self._install(self._refined(curvature, sums.n, summed))
        self._settle(loss, n, self.backend.n_outputs)
        for snapshot in reversed(snapshots):
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

    def merge(self, others: Sequence[Any]) -> None:
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

    def _settle(self, loss: float, n_data: int, n_outputs: int) -> None:
        self.covariance_scale = self.likelihood_temperature = 1.0
        self.loss, self.n_data = loss, n_data
        self.n_outputs = self.model.output_size = n_outputs
        # A model may be spread over devices; the posterior is on one.
        flat = [p.detach().flatten().to(self._device, self._dtype) for p in self.params]
        self.mean = torch.cat(flat)

    @property
    def _fitted(self) -> bool:
        return self.n_data > 0

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        """Add a batch's curvature to sums that start as ``None``; return its loss and the sums."""
        raise NotImplementedError

    def _tensors(self, state: Any) -> list[Tensor]:
        """Return the tensors that the sums consist of."""
        return [state]

    def _announce(self, loader: DataLoader) -> None:
        """Hear of the data before they are passed over."""

    def _pass(self) -> Pass:
        """Return what a fit's first pass over the data adds up."""
        return Pass(self._add, self._tensors)

    def _assembled(self, state: Any, n: int) -> Any:
        """Return the curvature that sums over ``n`` examples amount to."""
        return state

    def _joined(self, curvature: Any, n: int, other: Any, m: int) -> Any:
        """Return the curvature of ``n`` examples together with that of ``m`` others."""
        return curvature + other

    def _refined(self, curvature: Any, n: int, summed: Callable[[Pass], Sums]) -> Any:
        """Return the curvature that is installed after a fit, perhaps after more passes.

        Args:
            curvature: What the first pass amounts to, with what was fitted before.
            n: Examples that a pass sees.
            summed: Passes over the training data.
        """
        return curvature

    def _install(self, curvature: Any) -> None:
        """Make a curvature the posterior's; nothing changes if it is not finite."""
        raise NotImplementedError

    @property
    def curvature(self) -> Any:
        """Curvature of the summed loss: a `LowRankKron`, a diagonal or a dense matrix."""
        self._check_H_init()
        return self.H

    def by_example(self, batch: Any) -> Any:
        """Return a batch with labels in the form in which every row is an example.

        It is the batch itself, but for the pairs of a reward model: see `as_pairs`.

        Raises:
            TypeError: If a reward model is given no mapping.
            ValueError: If a reward model is given something else than pairs.
        """
        return as_pairs(batch, self.dict_key_y) if self.likelihood == REWARD_MODELING else batch

    def labelled(self, batch: Any) -> tuple[Any, Tensor]:
        """Split a batch into what the model takes and labels on the posterior's device.

        Raises:
            ValueError: If labels are missing, a reward model is given no pairs, or labels of tokens
                do not fit the tokens.
            TypeError: If the batch is neither mapping nor pair.
        """
        if self.likelihood == REWARD_MODELING:
            batch = as_pairs(batch, self.dict_key_y)
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
        if self.likelihood == LANGUAGE_MODELING:
            y = token_labels(x, y)
            x = {**x, "labels": y}
        if self.likelihood == "regression":
            y = y.to(self._dtype)
            y = y.unsqueeze(-1) if y.ndim == 1 else y
        return x, y
