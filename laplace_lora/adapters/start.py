"""Which tensors of an adapter stood at zero before training, so that it changed nothing."""

from __future__ import annotations

from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

STARTS_AT_ZERO = (True, "gaussian", "eva")


def zero_at_start(model: nn.Module) -> list[nn.Parameter]:
    """Return the active adapter's tensors that PEFT had set to zero before training.

    ``lora_B`` of linear layers and convolutions, ``lora_embedding_A`` of embeddings, and the bias
    of ``lora_B``. With them at zero the base model answers.

    Args:
        model: Any module with a LoRA adapter.

    Raises:
        ValueError: If there is no LoRA adapter, or one that did not start so.
    """
    found: list[nn.Parameter] = []
    active: set[str] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer).__module__.split(".")[2:3] != ["lora"] or not isinstance(layer, LoraLayer):
            raise ValueError(f"{name!r} is a {type(layer).__name__}, not a LoRA layer")
        active |= set(layer.active_adapters)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_B:
                found += list(layer.lora_B[adapter].parameters())
            if adapter in layer.lora_embedding_A:
                found.append(layer.lora_embedding_A[adapter])
    if not found:
        raise ValueError("the model has no LoRA adapter")
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            for name in active & set(configs):
                _check(configs[name])
    return found


def _check(config: object) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter is of a {type(config).__name__}, not LoRA")
    start = config.init_lora_weights
    if start not in STARTS_AT_ZERO:
        raise ValueError(
            f"the adapter was initialised with {start!r}, which does not start at the base model"
        )
