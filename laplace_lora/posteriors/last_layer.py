"""Last-layer posteriors: Laplace over the head alone, the transformer a fixed feature extractor."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from laplace import DiagLLLaplace, FullLLLaplace, KronLLLaplace
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn

from laplace_lora.likelihoods.base import labels_tokens
from laplace_lora.likelihoods.registry import likelihood_of
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.models.last_layer_model import LastLayerModel
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.posteriors.factored import KronNames
from laplace_lora.structures.dense import Dense, DensePrecision
from laplace_lora.structures.diagonal import Diagonal
from laplace_lora.structures.kron import Kron


def check_no_name(kwargs: dict[str, Any]) -> None:
    """Refuse laplace-torch's arguments about where the last layer is, and what it sees.

    Raises:
        ValueError: If there is one.
    """
    if kwargs.pop("feature_reduction", None) is not None:
        raise ValueError(
            "feature_reduction would have no effect: the last layer sees what the model gives it"
        )
    if kwargs.pop("last_layer_name", None) is not None:
        raise ValueError(
            "the last layer is found by itself: the model's last linear layer, or the answers' "
            "rows of its vocabulary; leave `last_layer_name` out"
        )


class LastLayerLaplace(LoraLaplace):
    """What the last-layer posteriors share: a model whose only trainable part is its head.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one; its head may be trained or frozen.
        likelihood: ``"classification"``, ``"multilabel"``, ``"regression"`` or
            ``"reward_modeling"``.
        structure: How the curvature is held.
        **kwargs: Arguments of `LoraLaplace`.

    Raises:
        ValueError: If the model has no linear last layer, gradients through the predictive are
            asked for (the features have none), the likelihood is of tokens or spans, or a
            ``last_layer_name`` is given.
    """

    # laplace-torch's last-layer classes know no layerwise prior.
    prior_precision_diag = BaseLaplace.prior_precision_diag

    def __init__(self, model: nn.Module, likelihood: str, structure: Any, **kwargs: Any) -> None:
        if kwargs.get("enable_backprop"):
            raise ValueError("last-layer posteriors cannot be differentiated by their input")
        objective = likelihood_of(likelihood)
        if labels_tokens(objective) or objective.has_spans:
            raise ValueError(
                "last-layer posteriors read one feature vector per example, and this model has one "
                "per token; use KronLoraLaplace with modules='classifier' (or 'qa_outputs'), which "
                "covers the head alone"
            )
        if objective.predicts_tokens:
            raise ValueError(
                "the last layer of a language model is its whole vocabulary, too large for a "
                "posterior; use KronLoraLaplace"
            )
        check_no_name(kwargs)
        super().__init__(model, likelihood, structure, last_layer_name="head", **kwargs)

    def fit(self, train_loader: Any, override: bool = True, *args: Any, **kwargs: Any) -> None:
        """Fit as `LoraLaplace.fit` does; a fit that starts anew takes the head as it is now."""
        last_layer = self.parts.last_layer
        with ExitStack() as stack:
            if last_layer is not None and (override or not self.state.is_fitted):
                stack.enter_context(last_layer.new_head())
            super().fit(train_loader, override, *args, **kwargs)

    def _differentiated(self, model: LogitsModel) -> nn.Module:
        return LastLayerModel(model)

    def _predicting_model(self) -> nn.Module:
        # laplace-torch has put a feature extractor around it.
        return self.model.get_submodule("model")


class KronLoraLLLaplace(KronNames, LastLayerLaplace, KronLLLaplace):
    """Last-layer posterior with Kronecker factors.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"multilabel"``, ``"regression"`` or
            ``"reward_modeling"``.
        factor_rank: As in `KronLoraLaplace`; a single layer is kept dense by default.
        low_rank_threshold: As in `KronLoraLaplace`.
        residual: As in `KronLoraLaplace`.
        eigenvalue_correction: As in `KronLoraLaplace`.
        **kwargs: Arguments of `LoraLaplace`.
    """

    _key = ("lora_last_layer", "kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        factor_rank: int | None = None,
        low_rank_threshold: int = 512,
        residual: str = "isotropic",
        eigenvalue_correction: bool = False,
        **kwargs: Any,
    ) -> None:
        spec = FactorSpec(factor_rank, low_rank_threshold, residual)
        super().__init__(model, likelihood, Kron(spec, eigenvalue_correction), **kwargs)


class DiagLoraLLLaplace(LastLayerLaplace, DiagLLLaplace):
    """Last-layer posterior with a diagonal precision."""

    _key = ("lora_last_layer", "diag")

    def __init__(self, model: nn.Module, likelihood: str, **kwargs: Any) -> None:
        super().__init__(model, likelihood, Diagonal(), **kwargs)


class FullLoraLLLaplace(LastLayerLaplace, FullLLLaplace):
    """Last-layer posterior with the exact GGN of the head, a dense matrix.

    Its prior precision is tuned as a scalar: another would not share the curvature's eigenvectors.
    """

    _key = ("lora_last_layer", "full")

    def __init__(self, model: nn.Module, likelihood: str, **kwargs: Any) -> None:
        super().__init__(model, likelihood, Dense(), **kwargs)

    @property
    def posterior_scale(self) -> Tensor:
        """Root of the posterior covariance, ``(parameters, parameters)``.

        laplace-torch keeps the first one it computes, whatever is fitted or tuned afterwards.
        """
        precision = self.fitted.precision
        assert isinstance(precision, DensePrecision)
        return precision.root.to(self._dtype)

    @property
    def posterior_covariance(self) -> Tensor:
        """Dense posterior covariance, ``(parameters, parameters)``."""
        precision = self.fitted.precision
        assert isinstance(precision, DensePrecision)
        return precision.inverse.to(self._dtype)

    def _as_H(self, curvature: Tensor) -> Tensor:
        return curvature.to(self._dtype)
