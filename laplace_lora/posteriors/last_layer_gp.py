"""The last-layer posterior in function space."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import torch
from laplace import FunctionalLLLaplace
from laplace.curvature import CurvlinopsGGN
from laplace.utils.feature_extractor import FeatureExtractor
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora.curvature.backends import LoraGGN
from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.changes.autocast import as_called, in_full_precision
from laplace_lora.models.last_layer_model import LastLayerModel
from laplace_lora.models.wrapping import wrapped
from laplace_lora.posteriors.copies import deep_copy, refuse_pickling, shallow_copy
from laplace_lora.posteriors.features_watch import FeaturesWatch, check_same_head
from laplace_lora.posteriors.last_layer import check_no_name
from laplace_lora.posteriors.state_dicts import check_entries
from laplace_lora.posteriors.training_features import training_features
from laplace_lora.structures.settings import TENSORS, check_count

Self = TypeVar("Self", bound="FunctionalLoraLLLaplace")
GP: Any = FunctionalLLLaplace
LIKELIHOODS = ("classification", "regression")
WATCHED = "features"  # in a state dictionary: what the transformer was


class _OfFeatures(FeatureExtractor):
    """A head as laplace-torch's model: what it is given are the features already.

    laplace-torch keeps those of the latest pass in a hook, where threads find each other's, and
    which in a copy of the model is still the original's.
    """

    def set_last_layer(self, last_layer_name: str) -> None:
        self._last_layer_name = last_layer_name
        # As in laplace-torch, not registered a second time.
        object.__setattr__(self, "last_layer", self.model.get_submodule(last_layer_name))

    def forward_with_features(self, x: Any) -> tuple[Tensor, Tensor]:
        return self.forward(x), x if self.enable_backprop else x.detach()


class FunctionalLoraLLLaplace(FunctionalLLLaplace):
    """Last-layer posterior in function space: a Gaussian process on the features of a subset.

    The features of the training data are computed once, in the fit. laplace-torch's
    `FunctionalLLLaplace` does the rest.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"`` or ``"regression"``.
        n_subset: Training examples that the process is conditioned on.
        target_ids: Answer tokens of a causal language model, see `LogitsModel`.
        **kwargs: laplace-torch's arguments.

    Raises:
        ValueError: If the likelihood is neither ``"classification"`` nor ``"regression"``, or not
            the model's, ``n_subset`` is no positive number, or a ``last_layer_name`` is given.
    """

    _key = ("lora_last_layer", "gp")
    __call__ = in_full_precision(GP.__call__)
    functional_samples = in_full_precision(GP.functional_samples)
    predictive_samples = in_full_precision(GP.predictive_samples)
    optimize_prior_precision = in_full_precision(GP.optimize_prior_precision)
    _fitted: bool  # laplace-torch's

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        n_subset: int,
        *,
        target_ids: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        self.objective = likelihood_of(likelihood)
        if likelihood not in LIKELIHOODS:
            raise ValueError(
                f"the Gaussian process is laplace-torch's, of {' or '.join(LIKELIHOODS)}, and the "
                f"likelihood is {likelihood!r}; use another class"
            )
        check_count("n_subset", n_subset)
        backend = kwargs.pop("backend", None)
        check_no_name(kwargs)
        # laplace-torch accepts three backends and asks them for the Jacobian of a linear layer.
        kwargs["backend"] = CurvlinopsGGN if backend in (None, LoraGGN) else backend
        logits_model = wrapped(self.objective, model, target_ids, None)
        self.objective.check_problem(logits_model.problem_type)
        split = LastLayerModel(logits_model)
        of_features = nn.Sequential(nn.Identity(), split.head)
        super().__init__(of_features, likelihood, n_subset, last_layer_name="1", **kwargs)
        self._put(split)
        self._watch: FeaturesWatch | None = None
        self._built_for: tuple[float, ...] = ()

    @property
    def features(self) -> Any:
        """From a batch to what the last layer sees of it, ``(batch, d)``."""
        return self._split.features

    @in_full_precision
    def fit(self, train_loader: DataLoader[Any], progress_bar: bool | None = None) -> None:
        """Fit the process. If anything fails, the earlier one stays as it was.

        Args:
            train_loader: Batches with labels.
            progress_bar: Whether to show progress, see `progress`.

        Raises:
            ValueError: If labels are missing or none that the model can have, or the data are
                fewer than ``n_subset``.
            FloatingPointError: If the loss is not finite; names batch and rows.
        """
        twin = self._with_present_head()
        twin._fit(train_loader, progress_bar)
        vars(self).update(vars(twin))  # at once: an interruption leaves the one or the other

    def _fit(self, train_loader: DataLoader[Any], progress_bar: bool | None) -> None:
        source = self.features.source
        watch = FeaturesWatch(source)
        with together(train_loader, device=self._device, runs=source) as team:
            batches = (
                self.objective.split(batch, self.dict_key_y, self._device, self._dtype)
                for batch in team.batches(train_loader, "Computing features", progress_bar)
            )
            features, labels = training_features(self._split, self.objective, batches)
            rows = team.rows(features=features, labels=labels)
        count = len(rows["labels"]) if rows else 0
        if count < self.n_subset:
            raise ValueError(f"n_subset is {self.n_subset}, but there are {count} examples")
        data = TensorDataset(rows["features"], rows["labels"])
        # accelerate's loaders have none
        batch_size = getattr(train_loader, "batch_size", None) or self.n_subset
        self.loss = 0.0  # laplace-torch adds to that of an earlier fit
        super().fit(DataLoader(data, batch_size=batch_size), progress_bar=progress_bar is True)
        self._watch = watch

    @in_full_precision
    def log_marginal_likelihood(
        self, prior_precision: Tensor | None = None, sigma_noise: Tensor | None = None
    ) -> Tensor:
        """Return the log evidence of the examples that the process is conditioned on.

        Of a regression ``log N(y; m, K + σ²)`` with the prior's mean ``m`` and kernel ``K``.

        Args:
            prior_precision: Replaces the present one.
            sigma_noise: Replaces the present one, of a regression.

        Returns:
            A scalar in nats.

        Raises:
            RuntimeError: If there was no fit, or the model has changed since, see `FeaturesWatch`.
        """
        if not self._fitted:
            raise RuntimeError("the process has not been fitted, so it has no evidence; call `fit`")
        self._check_unchanged()
        value: Tensor = super().log_marginal_likelihood(prior_precision, sigma_noise)
        if not self.objective.has_noise:
            return value
        targets = self.n_subset * self.n_outputs
        # Determinant and scatter hold noise and residuals, which laplace-torch counts once more.
        return value - self.log_likelihood - 0.5 * targets * math.log(2 * math.pi)

    def _check_nonempty_inputs(self, x: Any) -> None:
        """Do nothing: laplace-torch looks under one key, and inputs may have others."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with some values of each tensor of the transformer."""
        watched = None if self._watch is None else self._watch.state
        return {**super().state_dict(), WATCHED: watched}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a process of the same arguments, at its weights.

        Args:
            state_dict: From `state_dict`; those of earlier versions tell by the last layer alone
                whether they are of this model.

        Raises:
            ValueError: If the state is of another class, another likelihood or another model. The
                earlier one stays as it was.
        """
        twin = self._with_present_head()
        present = twin.mean
        check_entries(state_dict, [name for name in twin.state_dict() if name != WATCHED])
        super(FunctionalLoraLLLaplace, twin).load_state_dict(state_dict)
        check_same_head(present, twin.mean)
        twin._watch = FeaturesWatch(self.features.source)
        if state_dict.get(WATCHED) is not None:
            twin._watch.check_state(state_dict[WATCHED])
        twin._built_for = ()
        vars(self).update(vars(twin))

    def __copy__(self: Self) -> Self:
        return shallow_copy(self)

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        return deep_copy(self, self.features.source, memo)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickling(self)

    def _put(self, split: LastLayerModel) -> None:
        """Take a model's features and its head for the process's own."""
        split.copied_from = ()  # earlier heads are of no use
        self._split = split
        of_features = nn.Sequential(nn.Identity(), split.head)
        self.model = _OfFeatures(of_features, "1", self.enable_backprop)
        self._backend = None  # laplace-torch's has the model that it was made with
        self.params = list(split.head.parameters())
        self.mean = parameters_to_vector(self.params).detach()

    def _with_present_head(self: Self) -> Self:
        """Return a copy with a head of its own: the model's, which may have been trained on."""
        twin, split = copy.copy(self), copy.deepcopy(self._split)
        split.take_head()
        twin._put(split)
        for name in TENSORS:
            setattr(twin, f"_{name}", getattr(self, f"_{name}").to(twin.mean))
        return twin

    def _check_unchanged(self) -> None:
        self.features.check_adapter()
        if self._watch is not None:
            self._watch.check()

    @in_full_precision
    def _glm_predictive_distribution(self, X: Any, joint: bool = False) -> tuple[Tensor, Tensor]:
        self._check_unchanged()
        # laplace-torch builds it when a prior precision is assigned, and at no other change.
        if self._built_for != self._values():
            self._build_Sigma_inv()
        with as_called():
            features = self.features(X)
        return super()._glm_predictive_distribution(features, joint)

    def _build_Sigma_inv(self) -> None:
        super()._build_Sigma_inv()
        self._built_for = self._values()

    def _values(self) -> tuple[float, ...]:
        noise = float(torch.as_tensor(self.sigma_noise).detach())
        return (*self.prior_precision.detach().tolist(), noise, self.temperature)
