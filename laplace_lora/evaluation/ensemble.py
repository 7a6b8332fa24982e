"""`LoraEnsemble`: the average over adapters that were trained from several seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from laplace_lora.data.batches import Batch
from laplace_lora.data.pairs import check_not_stacked
from laplace_lora.evaluation.baselines import MAP
from laplace_lora.evaluation.rows import reads_pairs
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.models.changes.twins import resampled


class LoraEnsemble(MAP):
    """Average over adapters trained from several seeds (Lakshminarayanan et al. 2017).

    Source: arXiv:1612.01474; for LoRA Wang, Aitchison, Rudolph (2023), arXiv:2310.00035. All
    adapters are loaded into one `PeftModel`, so the base model is in memory once. They are switched
    in a twin with adapters of its own, beside which other threads may run the model. One that is
    compiled or offloaded cannot have a twin, see `resampled`, and must not run beside an ensemble.

    Args:
        model: A `PeftModel` or a `LogitsModel` around one.
        adapters: Names of the members; all loaded adapters when ``None``.
        **kwargs: Arguments of `MAP`.

    Raises:
        ValueError: If there are fewer than two members, one is not loaded, or comes twice.
    """

    def __init__(
        self, model: nn.Module, adapters: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(model, **kwargs)
        peft_model: PeftModel = self.model.model
        loaded = list(peft_model.peft_config) if isinstance(peft_model, PeftModel) else []
        self.adapters = loaded if adapters is None else list(adapters)
        missing = sorted(set(self.adapters) - set(loaded))
        if missing or len(self.adapters) < 2 or len(set(self.adapters)) < len(self.adapters):
            raise ValueError(
                f"an ensemble needs two different adapters or more, all loaded: asked for "
                f"{self.adapters}, loaded are {loaded}; add others with `model.load_adapter`"
            )

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Return class probabilities, ``(batch, classes)``.

        Raises:
            ValueError: If an adapter is merged, or a reward model is given stacked pairs.
        """
        if reads_pairs(self):
            check_not_stacked(batch)
        if any(getattr(module, "merged", False) for module in self.model.modules()):
            raise ValueError("an adapter is merged into the base model; unmerge it first")
        # Other threads may be running the adapter that is active, and need its gradients.
        with (
            evaluation_mode(self.model),
            resampled(self.model, self._switched()) as (twin, switched),
            _active_adapter_restored(twin, switched) as peft_model,
        ):
            samples = []
            for name in self.adapters:
                peft_model.set_adapter(name)
                samples.append(self._probabilities(twin(batch), batch))
        return torch.stack(samples).mean(0)

    def _switched(self) -> list[nn.Parameter]:
        """Return the tensors of all adapters, of which PEFT makes the active one's trainable."""
        peft_model: Any = self.model.model
        loaded = set(peft_model.peft_config)
        named = self.model.named_parameters()
        return [p for name, p in named if not loaded.isdisjoint(name.split("."))]


@contextmanager
def _active_adapter_restored(
    model: nn.Module, switched: Sequence[nn.Parameter]
) -> Iterator[PeftModel]:
    peft_model: Any = model.model
    active, all_active = peft_model.active_adapter, list(peft_model.active_adapters)
    requires_grad = [(p, p.requires_grad) for p in switched]

    def put_back() -> None:
        peft_model.set_adapter(active)
        if len(all_active) > 1:
            peft_model.base_model.set_adapter(all_active)
        for parameter, required in requires_grad:
            parameter.requires_grad_(required)

    try:
        yield peft_model
    finally:
        try:
            put_back()
        finally:
            put_back()  # for an interrupt of the first
