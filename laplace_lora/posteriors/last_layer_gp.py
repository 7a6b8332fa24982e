"""The last-layer posterior in function space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from laplace import FunctionalLLLaplace
from laplace.curvature import CurvlinopsGGN
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from laplace_lora.curvature.backends import LoraGGN
from laplace_lora.data.distributed import together
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.models.last_layer_model import LastLayerModel
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.posteriors.last_layer import check_no_name


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
        ValueError: If the likelihood is ``"reward_modeling"`` or ``"multilabel"``, or not the
            model's, or a ``last_layer_name`` is given.
    """

    _key = ("lora_last_layer", "gp")

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
        if self.objective.has_pairs:
            raise ValueError("the Gaussian process takes no pairs; use another last-layer class")
        if self.objective.has_independent_labels:
            raise ValueError(
                "the Gaussian process is laplace-torch's, which knows no independent labels; use "
                "another last-layer class"
            )
        backend = kwargs.pop("backend", None)
        check_no_name(kwargs)
        # laplace-torch accepts three backends and asks them for the Jacobian of a linear layer.
        kwargs["backend"] = CurvlinopsGGN if backend in (None, LoraGGN) else backend
        wrapped = LogitsModel.wrap(model, target_ids)
        self.objective.check_problem(wrapped.problem_type)
        split = LastLayerModel(wrapped)
        of_features = nn.Sequential(nn.Identity(), split.head)
        super().__init__(of_features, likelihood, n_subset, last_layer_name="1", **kwargs)
        self.features = split.features

    def fit(self, train_loader: DataLoader[Any], progress_bar: bool | None = None) -> None:
        """Fit the process.

        Args:
            train_loader: Batches with labels.
            progress_bar: Whether to show progress, see `progress`.

        Raises:
            ValueError: If labels are missing, or the data are fewer than ``n_subset``.
        """
        features, labels = [], []
        with together(train_loader, device=self._device, runs=self.model) as team:
            for batch in team.batches(train_loader, "Computing features", progress_bar):
                x, y = self.objective.split(batch, self.dict_key_y, self._device, self._dtype)
                features.append(self.features(x))
                labels.append(y)
            rows = team.rows(features=features, labels=labels)
        count = len(rows["labels"]) if rows else 0
        if count < self.n_subset:
            raise ValueError(f"n_subset is {self.n_subset}, but there are {count} examples")
        data = TensorDataset(rows["features"], rows["labels"])
        # accelerate's loaders have none
        batch_size = getattr(train_loader, "batch_size", None) or self.n_subset
        self.loss = 0.0  # laplace-torch adds to that of an earlier fit
        super().fit(DataLoader(data, batch_size=batch_size), progress_bar=progress_bar is True)

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
        """
        value: Tensor = super().log_marginal_likelihood(prior_precision, sigma_noise)
        if not self.objective.has_noise:
            return value
        targets = self.n_subset * self.n_outputs
        # Determinant and scatter hold noise and residuals, which laplace-torch counts once more.
        return value - self.log_likelihood - 0.5 * targets * math.log(2 * math.pi)

    def _check_nonempty_inputs(self, x: Any) -> None:
        """Do nothing: laplace-torch looks under one key, and inputs may have others."""

    def _glm_predictive_distribution(self, X: Any, joint: bool = False) -> tuple[Tensor, Tensor]:
        return super()._glm_predictive_distribution(self.features(X), joint)
