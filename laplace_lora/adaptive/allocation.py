"""AdaLoRA's rank allocation during training, by any importance score.

`set_importance_score` replaces PEFT's allocator; PEFT's ``update_and_allocate(step)`` is called as
before, and its cubic schedule still sets the budget.
"""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, PeftModel
from peft.tuners.adalora import AdaLoraModel, RankAllocator
from torch import Tensor, nn

from laplace_lora.adapters.activation import (
    adalora_layers,
    freeze_untrainable,
    kept_triplets,
)
from laplace_lora.adaptive.scores import Components, ImportanceScore, best
from laplace_lora.data.sharding import unwrapped


def adalora_components(model: nn.Module, adapter: str) -> list[Components]:
    """Return the triplets of an AdaLoRA adapter, in the order of the layers' names."""
    return [
        Components(name, layer.lora_A[adapter], layer.lora_B[adapter], layer.lora_E[adapter])
        for name, layer in sorted(adalora_layers(model).items())
        if adapter in layer.lora_A
    ]


class ScoreAllocator(RankAllocator):
    """PEFT's allocator with another score, keeping exactly as many triplets as the budget.

    Args:
        model: The model inside PEFT's `AdaLoraModel`.
        config: The adapter's configuration.
        adapter: The adapter's name.
        score: Importance of the triplets.

    Attributes:
        score: Importance of the triplets.
        rank_pattern: What the latest mask kept, by the name of each ``lora_E``.
    """

    def __init__(
        self, model: nn.Module, config: AdaLoraConfig, adapter: str, score: ImportanceScore
    ) -> None:
        self.score = score
        self.rank_pattern: dict[str, list[bool]] | None = None
        super().__init__(model, config, adapter)

    def reset_ipt(self) -> None:
        """Reset the score; PEFT calls this at the start and after the last mask."""
        self.score.reset()

    def update_ipt(self, model: nn.Module) -> None:
        """Let the score observe a step, before its gradients are zeroed."""
        layers = adalora_components(model, self.adapter_name)
        self.score.observe([p for layer in layers for p in layer.parameters])

    @torch.no_grad()
    def mask_to_budget(self, model: nn.Module, budget: int) -> dict[str, list[bool]]:
        """Set the singular values of all but the ``budget`` best triplets to zero.

        Raises:
            FloatingPointError: If a score is not finite; names the layer.
        """
        layers = adalora_components(model, self.adapter_name)
        masks = best(layers, self.score.scores(layers), budget)
        pattern = {}
        for layer, keep in zip(layers, masks, strict=True):
            _singular_values(layer).masked_fill_(~keep.unsqueeze(1), 0.0)
            pattern[f"{layer.name}.lora_E.{self.adapter_name}"] = keep.tolist()
        return pattern

    def update_and_allocate(
        self, model: nn.Module, global_step: int, force_mask: bool = False
    ) -> tuple[int, dict[str, list[bool]] | None]:
        """Observe a step, and mask if one is due.

        Only the last mask is reported to PEFT, which would otherwise save shrunken adapters from
        which training cannot continue.

        Returns:
            The budget of this step, and what the last mask kept.
        """
        budget, pattern = super().update_and_allocate(model, global_step, force_mask)
        self.rank_pattern = pattern or self.rank_pattern
        return budget, pattern if force_mask else None

    @torch.no_grad()
    def mask_using_rank_pattern(
        self, model: nn.Module, rank_pattern: dict[str, list[bool]]
    ) -> None:
        """Keep pruned singular values at zero after the last mask."""
        for layer in adalora_components(model, self.adapter_name):
            keep = kept_triplets(rank_pattern, layer.name, self.adapter_name)
            if keep is None:
                raise ValueError(f"the rank pattern has no entry for '{layer.name}.lora_E'")
            if len(keep) == len(layer.A):  # shrunken tensors have no pruned triplets left
                mask = torch.tensor(keep, device=layer.A.device)
                _singular_values(layer).masked_fill_(~mask.unsqueeze(1), 0.0)


def set_importance_score(peft_model: PeftModel, score: ImportanceScore) -> ScoreAllocator:
    """Let AdaLoRA allocate its ranks by another score.

    Keep calling ``peft_model.base_model.update_and_allocate(step)`` after the optimiser's step and
    before the gradients are zeroed; saved adapters stay ordinary ones. Also freezes PEFT's rank
    counts, so build the optimiser after this, or after `freeze_untrainable`.

    Args:
        peft_model: An AdaLoRA model in training.
        score: `SensitivityScore`, `PosteriorScore`, or another object with their methods.

    Returns:
        The allocator installed.

    Raises:
        TypeError: If the model is not an AdaLoRA model with an adapter to train.
        ValueError: If the schedule has no final phase or the target rank is above the initial one.
    """
    peft_model = unwrapped(peft_model)
    adapter, config = trained_adapter(peft_model)
    if config.tfinal < 1:
        raise ValueError("tfinal must be at least 1: with 0 PEFT never fixes the final ranks")
    if config.target_r > config.init_r:
        raise ValueError(f"target_r={config.target_r} is above init_r={config.init_r}")
    freeze_untrainable(peft_model)
    tuner = peft_model.base_model
    allocator = ScoreAllocator(tuner.model, config, adapter, score)
    tuner.rankallocator = allocator
    return allocator


def trained_adapter(peft_model: nn.Module) -> tuple[str, AdaLoraConfig]:
    """Return name and configuration of the adapter that an AdaLoRA model trains.

    Raises:
        TypeError: If the model is not an AdaLoRA model with an adapter to train.
    """
    tuner = getattr(peft_model, "base_model", None)
    adapter = getattr(tuner, "trainable_adapter_name", None)
    if not isinstance(tuner, AdaLoraModel) or adapter is None:
        raise TypeError(
            "expected a PeftModel with an AdaLoRA adapter in training (get_peft_model with an "
            f"AdaLoraConfig), got {type(peft_model).__name__} around {type(tuner).__name__}"
        )
    return adapter, tuner.peft_config[adapter]


def pattern_from_zeros(model: PeftModel, adapter: str) -> dict[str, list[bool]]:
    """Return which triplets are left: pruned singular values are exactly zero."""
    return {
        f"{layer.name}.lora_E.{adapter}": layer.alive.tolist()
        for layer in adalora_components(model.base_model.model, adapter)
    }


def check_final(pattern: dict[str, list[bool]], config: AdaLoraConfig) -> None:
    """Refuse to resume past the last mask with more triplets than it leaves.

    Raises:
        ValueError: If there are more.
    """
    remaining, budget = sum(map(sum, pattern.values())), config.target_r * len(pattern)
    if remaining > budget:
        raise ValueError(
            f"cannot resume: the checkpoint is past the final mask but keeps {remaining} triplets, "
            f"more than {budget}"
        )


def _singular_values(layer: Components) -> Tensor:
    assert layer.E is not None
    return layer.E
