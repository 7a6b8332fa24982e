"""Last-layer posteriors: Laplace over the head alone, the transformer a fixed feature extractor.

The classes of laplace-torch's `LLLaplace` family with this package's fitting, tuning and
predictive. The features and the head's own copy are `heads`'.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from laplace import DiagLLLaplace, FullLLLaplace, KronLLLaplace
from laplace.baselaplace import BaseLaplace
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.data.pairs import passes
from laplace_lora.likelihoods.roots import LANGUAGE_MODELING
from laplace_lora.models.last_layer_model import LastLayerModel
from laplace_lora.posteriors.base import LoraPosterior
from laplace_lora.posteriors.factored import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.predictive.glm import Gram
from laplace_lora.tuning.evidence import Spectrum


class LastLayerPosterior(LoraPosterior):
    """What the last-layer posteriors share: a model whose only trainable part is its head.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one; its head may be trained or frozen.
        likelihood: ``"classification"``, ``"regression"`` or ``"reward_modeling"``.
        **kwargs: Arguments of `LoraPosterior`.

    Raises:
        ValueError: If the model has no linear last layer, gradients through the predictive are
            asked for (the features have none), or the likelihood is ``"language_modeling"``.
    """

    def __init__(self, model: nn.Module, likelihood: str, **kwargs: Any) -> None:
        if kwargs.get("enable_backprop"):
            raise ValueError("last-layer posteriors cannot be differentiated by their input")
        if likelihood == LANGUAGE_MODELING:
            raise ValueError(
                "the last layer of a language model is its whole vocabulary, too large for a "
                "posterior; use KronLoraLaplace"
            )
        super().__init__(model, likelihood, last_layer_name="head", **kwargs)

    @staticmethod
    def _wrapped(model: nn.Module, target_ids: Sequence[int] | Tensor | None) -> nn.Module:
        return LastLayerModel(LoraPosterior._wrapped(model, target_ids))

    # laplace-torch's last-layer classes know no layerwise prior.
    prior_precision_diag = BaseLaplace.prior_precision_diag

    @torch.no_grad()
    def _nn_functional_samples(
        self, X: Any, n_samples: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample heads, ``(n_samples, batch, outputs)``; the features are computed once."""
        self._check_H_init()
        features = [self.model.model.features(part) for part in passes(X)]
        head = self.model.last_layer
        outputs = []
        for _ in range(n_samples):
            weight, bias = self._scaled_sample(generator).split(
                [head.weight.numel(), self.n_params - head.weight.numel()]
            )
            weight = weight.view_as(head.weight)
            shift = None if head.bias is None else bias
            outputs.append(torch.cat([F.linear(x, weight, shift) for x in features], dim=-1))
        return torch.stack(outputs) / self.likelihood_temperature


class KronLoraLLLaplace(LastLayerPosterior, KronLoraLaplace, KronLLLaplace):
    """Last-layer posterior with Kronecker factors.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"`` or ``"reward_modeling"``.
        factor_rank: As in `KronLoraLaplace`; a single layer is kept dense by default.
        **kwargs: Arguments of `KronLoraLaplace`.
    """

    _key = ("lora_last_layer", "kron")

    def __init__(
        self, model: nn.Module, likelihood: str, *, factor_rank: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, likelihood, factor_rank=factor_rank, **kwargs)


class DiagLoraLLLaplace(LastLayerPosterior, DiagLoraLaplace, DiagLLLaplace):
    """Last-layer posterior with a diagonal precision."""

    _key = ("lora_last_layer", "diag")


class FullLoraLLLaplace(LastLayerPosterior, FullLLLaplace):
    """Last-layer posterior with the exact GGN of the head, a dense matrix.

    Its prior precision is tuned as a scalar: another would not share the curvature's eigenvectors.
    """

    _key = ("lora_last_layer", "full")
    H: Tensor

    def optimize_prior_precision(self, *args: Any, **kwargs: Any) -> None:
        """Tune the prior precision, see `PriorTuning`; scalar only.

        Raises:
            ValueError: As `PriorTuning`, and if ``prior_structure`` is not ``"scalar"``.
        """
        structure = kwargs.get("prior_structure", "scalar")
        if structure != "scalar":
            raise ValueError(
                f"a full matrix cannot have prior_structure={structure!r}; use 'scalar', or a Kron "
                "or diagonal posterior"
            )
        super().optimize_prior_precision(*args, **kwargs)

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P − log det P₀`` of the evidence, a float64 scalar."""
        self._check_H_init()
        root = self.prior_precision_diag.double().rsqrt()
        ratio = self._H_factor.double() * root.unsqueeze(1) * self.H.double() * root
        return torch.logdet(ratio + torch.eye(len(root), dtype=root.dtype, device=root.device))

    def curvature_size(self) -> int:
        """Return how many numbers the posterior's curvature holds."""
        return self.n_params**2

    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``."""
        return self.posterior_covariance.diagonal()

    def gram_blocks(self, x: Any) -> tuple[Tensor, Iterator[tuple[int, list[Gram]]]]:
        """Return mean logits, and their covariance as a function of the prior, in one block."""
        self._check_H_init()
        values, vectors = self._spectrum()
        mean, blocks = self._judged(x)
        rows = torch.cat([block.flatten(2) for block in blocks], dim=-1) @ vectors
        return mean, iter([(0, [(values, rows.unsqueeze(2) * rows.unsqueeze(1))])])

    def block_spectra(self) -> list[Spectrum]:
        """Return the whole matrix's eigenvalues with the first tensor, none with the others."""
        self._check_H_init()
        values, _ = self._spectrum()
        return [[(values, 1)]] + [[(values.new_zeros(1), 0)]] * (self.n_layers - 1)

    def _spectrum(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh((self._H_factor * self.H).double())
        return values.clamp(min=0).to(self.H.dtype), vectors.to(self.H.dtype)

    def covariance_of(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, ``(batch, outputs, outputs)``, before ``covariance_scale``."""
        rows = [jacobian.flatten(2) for jacobian in jacobians]
        return self.functional_variance(torch.cat(rows, dim=-1))

    def _check_H_init(self) -> None:
        if not self._fitted:
            raise AttributeError("Laplace not fitted. Run fit() first.")

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        loss, matrix = self.backend.full(x, y)
        return loss, matrix if state is None else state + matrix

    def _install(self, curvature: Tensor) -> None:
        if not bool(curvature.isfinite().all()):
            raise FloatingPointError("the curvature of the last layer is not finite")
        self.H = curvature
        self._posterior_scale = None
