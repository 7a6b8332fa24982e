"""The ranks that are left once AdaLoRA's last mask has been set."""

from __future__ import annotations

from peft import AdaLoraConfig, PeftModel

from laplace_lora.adaptive.allocation import adalora_components


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
