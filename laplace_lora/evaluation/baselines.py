"""What a Laplace posterior is compared with, each a plain callable from a batch to probabilities.

Every baseline takes the same `PeftModel` (or `LogitsModel`) as the posteriors, and leaves it as it
was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.models.logits_model import LogitsModel
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.posteriors.factored import DiagLoraLaplace
from laplace_lora.posteriors.last_layer import KronLoraLLLaplace


class MAP:
    """The fine-tuned model itself.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        target_ids: Answer tokens of a causal language model, see `LogitsModel`.
    """

    def __init__(self, model: nn.Module, target_ids: Sequence[int] | Tensor | None = None) -> None:
        known = isinstance(model, LogitsModel)
        self.model = model if known else LogitsModel(model, target_ids)

    @torch.no_grad()
    def logits(self, batch: Any) -> Tensor:
        """Return logits, ``(batch, classes)``."""
        with evaluation_mode(self.model):
            return self.model(batch)

    def __call__(self, batch: Any) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        return self.logits(batch).softmax(-1)


class TemperatureScaling(MAP):
    """The model with its logits divided by a temperature (Guo et al. 2017, arXiv:1706.04599).

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        val_loader: Validation batches with labels; the temperature minimises their NLL.
        label_key: Key of the labels.
        **kwargs: Arguments of `MAP`.

    Attributes:
        temperature: What the logits are divided by.

    Raises:
        ValueError: If the loader is empty.
    """

    def __init__(
        self, model: nn.Module, val_loader: Any, label_key: str = "labels", **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        pairs = [
            (self.logits(batch), batch[label_key])
            if hasattr(batch, "keys")
            else (self.logits(batch[0]), batch[1])
            for batch in val_loader
        ]
        if not pairs:
            raise ValueError("the validation loader is empty")
        logits = torch.cat([f for f, _ in pairs]).double()
        labels = torch.cat([y.to(logits.device) for _, y in pairs])

        def loss(log_temperature: float) -> float:
            return float(F.cross_entropy(logits / math.exp(log_temperature), labels))

        found = minimize_scalar(loss, bounds=(-5, 5), method="bounded")
        self.temperature = math.exp(found.x)

    def __call__(self, batch: Any) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        return (self.logits(batch) / self.temperature).softmax(-1)


class MCDropout(MAP):
    """Average over the adapter's dropout, left on (Gal and Ghahramani 2016, arXiv:1506.02142).

    Only LoRA's own dropout is on; that of the base model, in whose presence it was trained or not,
    stays off.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        n_samples: Forward passes a batch.
        seed: Of the dropout masks, anew for every batch; torch's generators are left alone.
        **kwargs: Arguments of `MAP`.

    Raises:
        ValueError: If the adapter has no dropout.
    """

    def __init__(self, model: nn.Module, n_samples: int = 20, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(model, **kwargs)
        self.n_samples, self.seed = n_samples, seed
        self.dropouts = [
            module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Dropout) and ".lora_dropout." in name and module.p > 0
        ]
        if not self.dropouts:
            raise ValueError("the adapter was made without dropout; there is nothing to sample")

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        device = next(self.model.parameters()).device
        devices = [device] if device.type != "cpu" else []
        with evaluation_mode(self.model), torch.random.fork_rng(devices), self._dropout_on():
            torch.manual_seed(self.seed)
            samples = [self.model(batch).softmax(-1) for _ in range(self.n_samples)]
        return torch.stack(samples).mean(0)

    @contextmanager
    def _dropout_on(self) -> Iterator[None]:
        # `evaluation_mode`, around this, restores the modes.
        for module in self.dropouts:
            module.train()
        try:
            yield
        finally:
            for module in self.dropouts:
                module.eval()


class LoraEnsemble(MAP):
    """Average over adapters trained from several seeds (Lakshminarayanan et al. 2017).

    Source: arXiv:1612.01474; for LoRA Wang, Aitchison, Rudolph (2023), arXiv:2310.00035. All
    adapters are loaded into one `PeftModel`, so the base model is held once.

    Args:
        model: A `PeftModel` or a `LogitsModel` around one.
        adapters: Names of the members; all that are loaded when ``None``.
        **kwargs: Arguments of `MAP`.

    Raises:
        ValueError: If there are fewer than two members, or one is not loaded.
    """

    def __init__(
        self, model: nn.Module, adapters: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        peft_model: Any = self.model.model
        loaded = list(peft_model.peft_config) if isinstance(peft_model, PeftModel) else []
        self.adapters = loaded if adapters is None else list(adapters)
        missing = sorted(set(self.adapters) - set(loaded))
        if missing or len(self.adapters) < 2:
            raise ValueError(
                f"an ensemble needs two adapters or more that are loaded: asked for "
                f"{self.adapters}, loaded are {loaded}; add some with `model.load_adapter`"
            )

    @torch.no_grad()
    def __call__(self, batch: Any) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        with self._adapters_kept() as peft_model:
            samples = []
            for name in self.adapters:
                peft_model.set_adapter(name)
                samples.append(super().__call__(batch))
        return torch.stack(samples).mean(0)

    @contextmanager
    def _adapters_kept(self) -> Iterator[Any]:
        model: Any = self.model.model
        active = model.active_adapter
        trainable = [p.requires_grad for p in model.parameters()]
        try:
            yield model
        finally:
            model.set_adapter(active)
            for parameter, was in zip(model.parameters(), trainable, strict=True):
                parameter.requires_grad_(was)


def last_layer_laplace(model: nn.Module, train_loader: Any, **kwargs: Any) -> KronLoraLLLaplace:
    """Fit a last-layer Laplace posterior, its prior tuned by the marginal likelihood.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        train_loader: Training batches with labels.
        **kwargs: Arguments of `KronLoraLLLaplace`.
    """
    return _tuned(KronLoraLLLaplace(model, "classification", **kwargs), train_loader)


def diagonal_laplace(model: nn.Module, train_loader: Any, **kwargs: Any) -> DiagLoraLaplace:
    """Fit a diagonal Laplace posterior over the adapter, its prior tuned likewise.

    Args:
        model: A `PeftModel` or a `LogitsModel`.
        train_loader: Training batches with labels.
        **kwargs: Arguments of `DiagLoraLaplace`.
    """
    return _tuned(DiagLoraLaplace(model, "classification", **kwargs), train_loader)


def _tuned(la: Any, train_loader: Any) -> Any:
    la.fit(train_loader)
    la.optimize_prior_precision()
    return la
