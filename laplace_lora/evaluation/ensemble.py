"""`LoraEnsemble`: the average over adapters that were trained from several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from laplace_lora.data.batches import Batch
from laplace_lora.evaluation.baselines import MAP


class LoraEnsemble(MAP):
    """Average over adapters trained from several seeds (Lakshminarayanan et al. 2017).

    Source: arXiv:1612.01474; for LoRA Wang, Aitchison, Rudolph (2023), arXiv:2310.00035. All
    adapters are loaded into one `PeftModel`, so the base model is in memory once.

    Args:
        model: A `PeftModel` or a `LogitsModel` around one.
        adapters: Names of the members; all loaded adapters when ``None``.
        **kwargs: Arguments of `MAP`.

    Raises:
        ValueError: If there are fewer than two members, or one is not loaded.
    """

    def __init__(
        self, model: nn.Module, adapters: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        peft_model: PeftModel = self.model.model
        loaded = list(peft_model.peft_config) if isinstance(peft_model, PeftModel) else []
        self.adapters = loaded if adapters is None else list(adapters)
        missing = sorted(set(self.adapters) - set(loaded))
        if missing or len(self.adapters) < 2:
            raise ValueError(
                f"an ensemble needs two adapters or more, all loaded: asked for {self.adapters}, "
                f"loaded are {loaded}; add others with `model.load_adapter`"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return class probabilities, ``(batch, classes)``."""
        with self._active_adapter_restored() as peft_model:
            samples = []
            for name in self.adapters:
                peft_model.set_adapter(name)
                samples.append(super().__call__(batch))
        return torch.stack(samples).mean(0)

    @contextmanager
    def _active_adapter_restored(self) -> Iterator[PeftModel]:
        model: PeftModel = self.model.model
        active, all_active = model.active_adapter, list(model.active_adapters)
        requires_grad = [p.requires_grad for p in model.parameters()]
        try:
            yield model
        finally:
            model.set_adapter(active)
            if len(all_active) > 1:
                model.base_model.set_adapter(all_active)
            for parameter, required in zip(model.parameters(), requires_grad, strict=True):
                parameter.requires_grad_(required)
