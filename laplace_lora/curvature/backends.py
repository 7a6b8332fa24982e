"""`LoraGGN` and `LoraEF`: laplace-torch curvature backends for the adapters of a model."""

from __future__ import annotations

from typing import Any

from laplace.curvature import EFInterface, GGNInterface
from torch import Tensor, nn

from laplace_lora.curvature.backend import LoraCurvature
from laplace_lora.likelihoods.registry import likelihood_of


class LoraGGN(LoraCurvature, GGNInterface):
    """Generalised Gauss-Newton curvature, exact in the outputs from ``C − 1`` backward passes.

    Args:
        model: Model from a batch to outputs.
        likelihood: As of `LoraCurvature`.
        *args: The rest of laplace-torch's `GGNInterface` arguments.
        stochastic: Monte-Carlo Fisher, from one backward pass per label drawn; ``num_samples`` says
            how many are drawn for an example, or for each token or end of a span. ``None`` is true
            for language models, token classifiers and question answering, false for all others.
        **kwargs: The arguments by name, and those of `LoraCurvature`.

    Raises:
        ValueError: As `LoraCurvature`, or if ``num_samples`` is not positive, or labels are to be
            drawn and are not.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *args: Any,
        stochastic: bool | None = None,
        **kwargs: Any,
    ) -> None:
        if stochastic is None:
            stochastic = likelihood_of(likelihood).samples_labels
        super().__init__(model, likelihood, *args, stochastic=stochastic, **kwargs)
        if self.num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {self.num_samples}")
        if self.num_samples > 1 and not self.stochastic:
            raise ValueError(
                f"num_samples={self.num_samples} labels are drawn with stochastic=True only; the "
                "exact curvature draws none"
            )

    def columns(self, f: Tensor, y: Tensor) -> Tensor:
        """Return an exact or, if ``stochastic``, a sampled root of the output Hessian."""
        if self.stochastic:
            return self.objective.sampled_root(f, self.num_samples, y)
        return self.objective.root(f, y)


class LoraEF(LoraCurvature, EFInterface):
    """Empirical Fisher curvature: outer products of the gradients at the observed labels.

    For regression these are gradients of ``½‖f − y‖²``; laplace-torch's own empirical Fisher is
    twice as large there.

    Args:
        model: Model from a batch to outputs.
        likelihood: As of `LoraCurvature`.
        *args: The rest of laplace-torch's arguments.
        **kwargs: The arguments by name, and those of `LoraCurvature`.

    Raises:
        ValueError: As `LoraCurvature`, or if labels are to be drawn.
    """

    def __init__(self, model: nn.Module, likelihood: str, *args: Any, **kwargs: Any) -> None:
        if {"stochastic", "num_samples"} & set(kwargs):
            raise ValueError(
                "LoraEF takes the observed labels and draws none: leave stochastic and num_samples "
                "out, or use LoraGGN"
            )
        super().__init__(model, likelihood, *args, **kwargs)

    def columns(self, f: Tensor, y: Tensor) -> Tensor:
        """Return the gradients of the loss at the observed labels."""
        return self.objective.residual(f, y)
