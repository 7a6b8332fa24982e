"""`TrainingFreeBayes`: noise on an adapter, as wide as its own predictions allow."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.data.batches import Batch, model_inputs
from laplace_lora.data.distributed import together
from laplace_lora.evaluation.baselines import MAP
from laplace_lora.models.changes.modes import evaluation_mode, set_weights
from laplace_lora.models.changes.twins import resampled
from laplace_lora.structures.settings import check_count

SHARE_PER_EXAMPLE = 0.003  # of the authors' code, with the adapters that were trained plainly


@dataclass(frozen=True)
class _Layer:
    """One LoRA layer: its ``lora_A``, ``(r, q)``, and what turns noise into a change of it.

    Attributes:
        lora_A: The weight.
        spread: ``V diag(1/d)`` of ``lora_B = U diag(d) Vᵀ``, ``(r, rank of lora_B)``.
    """

    lora_A: nn.Parameter
    spread: Tensor


class TrainingFreeBayes(MAP):
    """Training-free Bayesianisation of an adapter (Shi et al. 2024, arXiv:2412.05723).

    With ``lora_B = U diag(d) Vᵀ`` the weight gets isotropic noise in the column space of
    ``lora_B``, ``ΔW = B A + σ U E``, ``E ~ N(0, I)``; the largest ``σ`` is taken that keeps the
    NLL of the anchor's classes within a tolerance. The classes are the model's own, so no labels
    are read. Probabilities are averaged over samples of the weights, the same for every batch.

    Differences from the authors' code (bayesian-peft, commit 7bdafeb): the search halves a
    logarithmic range that is wider than theirs (0.001 to 0.015), and all examples of a batch share
    a sample.

    Args:
        model: A `PeftModel` or a `LogitsModel`, with LoRA on linear layers. Heads that are trained
            whole get no noise.
        anchor_loader: Batches of inputs, usually the training data; labels are ignored.
        tolerance: How far the mean NLL of the anchor's classes may rise, as a share of its value
            without noise. The authors' code allows 0.003 times the number of examples, which is
            the default. A token classifier's examples are its tokens.
        n_samples: Samples of the weights, for the search and for predictions.
        widths: The range of ``σ``; the lower end is taken where nothing is within the tolerance.
        steps: Halvings of the range.
        seed: Of the noise.
        **kwargs: Arguments of `MAP`.

    Attributes:
        width: ``σ``, the standard deviation of the noise.

    Raises:
        ValueError: If there are no samples, the loader is empty, the model's labels are
            independent, the adapter is no LoRA on linear layers, or is as it was made, with
            ``lora_B`` zero.
    """

    def __init__(
        self,
        model: nn.Module,
        anchor_loader: Iterable[Batch],
        tolerance: float | None = None,
        n_samples: int = 10,
        widths: tuple[float, float] = (1e-4, 1.0),
        steps: int = 8,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        if self.objective.has_independent_labels:
            raise ValueError(
                "training-free Bayes keeps the model's own classes, and independent labels have "
                "none; compare with TemperatureScaling or MCDropout"
            )
        check_count("n_samples", n_samples)
        self.n_samples, self.seed, self.width = n_samples, seed, 0.0
        self._layers = _layers_of(self.model)
        with together(anchor_loader, runs=self.model) as team:
            batches = team.batches(anchor_loader, "Reading the anchor set")
            inputs = [model_inputs(batch) for batch in batches]

            def losses(classes: list[Tensor] | None) -> tuple[list[Tensor], Tensor]:
                probs = [_by_token(self(batch)) for batch in inputs]
                classes = [p.argmax(-1) for p in probs] if classes is None else classes
                nll = [
                    F.nll_loss(p.clamp_min(1e-12).log(), y, reduction="none")
                    for p, y in zip(probs, classes, strict=True)
                ]
                rows = team.rows(nll=nll)
                if not rows:
                    raise ValueError("the anchor loader is empty")
                return classes, rows["nll"].double()

            classes, before = losses(None)
            share = SHARE_PER_EXAMPLE * len(before) if tolerance is None else tolerance
            low, high = (math.log(width) for width in widths)
            for _ in range(steps):
                middle = (low + high) / 2
                self.width = math.exp(middle)
                if float(losses(classes)[1].mean()) <= float(before.mean()) * (1 + share):
                    low = middle
                else:
                    high = middle
        self.width = math.exp(low)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        if self.width == 0:
            return super().__call__(batch)
        weights = [layer.lora_A for layer in self._layers]
        generator = torch.Generator().manual_seed(self.seed)
        samples = []
        with evaluation_mode(self.model), resampled(self.model, weights) as (twin, own):
            for _ in range(self.n_samples):
                rows = [self._sample(layer, generator).flatten() for layer in self._layers]
                set_weights(own, torch.cat([row.to(rows[0].device) for row in rows]))
                samples.append(self._probabilities(twin(batch), batch))
        return torch.stack(samples).mean(0)

    def _sample(self, layer: _Layer, generator: torch.Generator) -> Tensor:
        """Return ``A + σ V diag(1/d) E``, whose product with ``lora_B`` is ``B A + σ U E``."""
        weight, spread = layer.lora_A.detach(), layer.spread
        noise = torch.randn(spread.shape[1], weight.shape[1], generator=generator)
        return weight + self.width * (spread @ noise.to(spread))


def _by_token(p: Tensor) -> Tensor:
    """Return probabilities of examples, or of the tokens that are no padding, ``(…, classes)``."""
    return p if p.ndim == 2 else p[p.sum(-1) > 0]


def _layers_of(model: nn.Module) -> list[_Layer]:
    layers = []
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            sides = [getattr(module, side, {}) for side in ("lora_A", "lora_B")]
            pair = [side[adapter] for side in sides if adapter in side]
            if not pair and adapter not in getattr(module, "lora_embedding_A", {}):
                continue
            has_experts = getattr(module, "num_experts", 1) > 1  # with a product of their own each
            if not pair or has_experts or not all(isinstance(side, nn.Linear) for side in pair):
                raise ValueError(f"training-free Bayes needs LoRA on linear layers; {name} is none")
            down, up = pair
            _, d, right = torch.linalg.svd(up.weight.detach().float(), full_matrices=False)
            kept = d > d.max() * max(up.weight.shape) * torch.finfo(d.dtype).eps
            layers.append(_Layer(down.weight, right[kept].T / d[kept]))
    if not layers or all(layer.spread.shape[1] == 0 for layer in layers):
        raise ValueError("there is no active LoRA layer whose lora_B is not zero; train it first")
    return layers
