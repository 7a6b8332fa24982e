"""Baselines for Laplace posteriors, each a plain callable from a batch to probabilities.

Every baseline takes the same `PeftModel` (or `LogitsModel`) as the posteriors and leaves it
unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from laplace_lora.data.batches import Batch, batch_labels, model_inputs
from laplace_lora.data.distributed import together
from laplace_lora.data.pairs import check_not_stacked
from laplace_lora.evaluation.baseline_likelihoods import (
    baseline_objective,
    check_has_classes,
    in_pairs,
)
from laplace_lora.evaluation.rows import reads_pairs
from laplace_lora.evaluation.sampled_dropout import dropout_on
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.token_classification import class_labels
from laplace_lora.models.changes.compiled import eager
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.structures.settings import check_count

SAMPLER = "lora_monteclora_sampler"


class MAP:
    """The fine-tuned model itself.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        target_ids: Answer tokens of a causal language model, see `LogitsModel`.
        likelihood: ``"classification"``, probabilities are a softmax of the logits, or
            ``"multilabel"``, the sigmoid of each; ``None`` for the second where the model's
            configuration says ``problem_type="multi_label_classification"``.

    Raises:
        ValueError: If ``likelihood`` is another, or the model's configuration says that several
            outputs are those of a regression.
    """

    def __init__(
        self,
        model: nn.Module,
        target_ids: Sequence[int] | Tensor | None = None,
        likelihood: str | None = None,
    ) -> None:
        self.model = LogitsModel.wrap(model, target_ids)
        self.objective = baseline_objective(self.model, likelihood)

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Return logits, ``(batch, classes)``.

        Raises:
            ValueError: If a reward model is given stacked pairs, see `as_pairs`.
        """
        if reads_pairs(self):
            check_not_stacked(batch)
        with evaluation_mode(self.model):
            logits: Tensor = self.model(batch)
        return logits

    def __call__(self, batch: Batch) -> Tensor:
        """Return class probabilities, ``(batch, classes)``, or those of labels.

        Of a token classifier ``(batch, tokens, classes)``, zeros at padding.

        Raises:
            ValueError: If the model has a single output, and the batch is none of pairs.
        """
        return self._probabilities(self.logits(batch), batch)

    def _probabilities(self, logits: Tensor, batch: Batch) -> Tensor:
        check_has_classes(self.objective, logits)
        p = self.objective.readout(None).under(logits)
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if p.ndim < 3 or mask is None:
            return p
        return p.masked_fill((mask == 0).to(p.device).unsqueeze(-1), 0)


class TemperatureScaling(MAP):
    """The model with its logits divided by a temperature (Guo et al. 2017, arXiv:1706.04599).

    A reward model's pairs have two classes, the rejected text and the chosen one; the temperature
    divides the difference of their rewards. A token classifier's minimises the NLL of the labelled
    tokens.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        val_loader: Validation batches with labels; the temperature minimises their NLL. A reward
            model's pairs in any form that `as_pairs` takes.
        label_key: Key of the labels.
        **kwargs: Arguments of `MAP`.

    Attributes:
        temperature: The divisor of the logits.

    Raises:
        ValueError: If the loader is empty, a batch has no labels, or they are not the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        val_loader: Iterable[Batch],
        label_key: str = "labels",
        **kwargs: Any,
    ) -> None:
        super().__init__(model, **kwargs)
        by_example = partial(in_pairs, label_key=label_key) if reads_pairs(self) else None
        title = "Scaling the temperature"
        with together(val_loader, runs=self.model) as team:
            pairs = [
                self._labelled(batch, label_key)
                for batch in team.batches(val_loader, title, by_example=by_example)
            ]
            rows = team.rows(f=[f for f, _ in pairs], y=[y for _, y in pairs])
        if not rows:
            raise ValueError("the validation loader is empty")
        if not len(rows["y"]):
            raise ValueError("no token of the validation loader has a label: all are -100")
        logits = rows["f"].double()
        labels = rows["y"].to(logits.device)

        def loss(log_temperature: float) -> float:
            return float(self.objective.nll(logits / math.exp(log_temperature), labels))

        minimum = minimize_scalar(loss, bounds=(-5, 5), method="bounded")
        self.temperature = math.exp(minimum.x)

    def _labelled(self, batch: Batch, label_key: str) -> tuple[Tensor, Tensor]:
        """Return logits and their labels, of a token classifier those of labelled tokens."""
        x, y = model_inputs(batch), batch_labels(batch, label_key)
        f = self.logits(x)
        if f.ndim == 3:
            y = class_labels(x, y.to(f.device))
            return f[y != IGNORED], y[y != IGNORED]
        return f, self.objective.split((x, y), label_key, f.device, f.dtype)[1]

    def __call__(self, batch: Batch) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        return self._probabilities(self.logits(batch) / self.temperature, batch)


class MCDropout(MAP):
    """Average over the adapter's dropout masks (Gal and Ghahramani 2016, arXiv:1506.02142).

    Only LoRA's own dropout is on, and only in the thread that asks. The base model's dropout stays
    off, whether or not it was on in training, that which its attentions apply themselves included.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        n_samples: Forward passes per batch.
        seed: Of the dropout masks, the same for every batch and in all threads; torch's global
            generators are left alone.
        **kwargs: Arguments of `MAP`.

    Raises:
        ValueError: If there are no samples, the active adapter has no dropout, or it is
            MonteCLoRA's, which draws weights wherever it applies it.
    """

    def __init__(self, model: nn.Module, n_samples: int = 20, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        check_count("n_samples", n_samples)
        self.n_samples, self.seed = n_samples, seed
        self.dropouts = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Dropout) and ".lora_dropout." in name and module.p > 0
        ]
        dropouts = set(self.dropouts)
        layers = [m for m in self.model.modules() if _active_dropouts(m) & dropouts]
        if not layers:
            raise ValueError("the adapter was made without dropout, so there is nothing to sample")
        if any(hasattr(layer, SAMPLER) for layer in layers):
            raise ValueError(
                "the adapter is MonteCLoRA's, which draws weights wherever it applies its dropout"
            )
        self._layers = layers

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        # Variants of LoRA, such as DoRA, ask the layer whether it trains, not its dropout.
        asked = {m: _active_dropouts(m) for m in self._layers if _active_variants(m)}
        with (
            evaluation_mode(self.model),
            eager(list(self.model.modules())),
            dropout_on(self.dropouts, asked, self.seed),
        ):
            samples = [self._probabilities(self.model(batch), batch) for _ in range(self.n_samples)]
        return torch.stack(samples).mean(0)


def _active_dropouts(layer: nn.Module) -> set[nn.Module]:
    """Return a LoRA layer's dropouts of active adapters; of any other module none."""
    if not isinstance(layer, LoraLayer):
        return set()
    return {layer.lora_dropout[a] for a in layer.active_adapters if a in layer.lora_dropout}


def _active_variants(layer: nn.Module) -> set[str]:
    """Return the active adapters of a LoRA layer that are of a variant."""
    variants: Any = getattr(layer, "lora_variant", {})
    return {a for a in layer.active_adapters if a in variants}  # type: ignore[union-attr]
