"""What an adapter's tensors were before training, so that it changed nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

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
    for layer, adapter in _active_layers(model):
        active.add(adapter)
        if adapter in layer.lora_B:
            found += list(layer.lora_B[adapter].parameters())
        if adapter in layer.lora_embedding_A:
            found.append(layer.lora_embedding_A[adapter])
    if not found:
        raise ValueError("the model has no LoRA adapter")
    for config in _configs(model, active):
        _check(config)
    return found


def base_biases_were_trained(model: nn.Module) -> bool:
    """Return whether the base model's own biases were trained, of which nothing is left.

    Args:
        model: Any module with a LoRA adapter.
    """
    active = {adapter for _, adapter in _active_layers(model)}
    return any(getattr(config, "bias", "none") != "none" for config in _configs(model, active))


@torch.no_grad()
def values_at_start(model: nn.Module, head: nn.Module | None) -> list[tuple[nn.Parameter, Tensor]]:
    """Return tensors of the active adapter and the values with which the base model answers.

    Zeros for `zero_at_start`; for the magnitudes of DoRA the norms of the base's weights; for whole
    modules that were trained (``modules_to_save``), but for the head, the weights they replace.

    Args:
        model: Any module with a LoRA adapter.
        head: The layer that gives the outputs, which stays as it was trained.

    Raises:
        ValueError: See `zero_at_start`; or if replaced weights are not at hand.
    """
    values = {parameter: torch.zeros_like(parameter) for parameter in zero_at_start(model)}
    kept = set() if head is None else {id(p) for p in head.parameters()}
    for name, trained, original in _replaced(model):
        if id(trained) not in kept:
            if original.device.type == "meta":
                raise ValueError(f"what {name!r} was before training is not at hand (offloaded)")
            values[trained] = original.detach().to(trained)
    for layer, adapter in _active_layers(model):
        if adapter in layer.lora_magnitude_vector:
            dora = layer.lora_magnitude_vector[adapter]
            values[dora.weight] = _norms(layer, adapter, dora)
    return list(values.items())


def _configs(model: nn.Module, adapters: set[str]) -> Iterator[Any]:
    """Yield the configurations of adapters."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            yield from (configs[name] for name in adapters & set(configs))


def _replaced(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield the weights of modules that were trained as a whole, and those that they replace."""
    for path, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and not module.disable_adapters:
            originals = dict(module.original_module.named_parameters())
            for adapter in set(module.active_adapters) & set(module.modules_to_save):
                for name, trained in module.modules_to_save[adapter].named_parameters():
                    yield f"{path}.{name}", trained, originals[name]


def _norms(layer: LoraLayer, adapter: str, dora: Any) -> Tensor:
    """Return what PEFT sets magnitudes to where the low-rank product is zero."""
    fresh = copy.deepcopy(dora)
    if adapter in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    fresh.update_layer(
        base_layer=layer.get_base_layer(),
        lora_A=torch.zeros_like(A),
        lora_B=torch.zeros_like(B),
        scaling=layer.scaling[adapter],
    )
    norms: Tensor = fresh.weight.detach().to(dora.weight)
    return norms


def _active_layers(model: nn.Module) -> Iterator[tuple[LoraLayer, str]]:
    for name, layer in model.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        if type(layer).__module__.split(".")[2:3] != ["lora"] or not isinstance(layer, LoraLayer):
            raise ValueError(f"{name!r} is a {type(layer).__name__}, not a LoRA layer")
        for adapter in layer.active_adapters:
            yield layer, adapter


def _check(config: object) -> None:
    if not isinstance(config, LoraConfig):
        raise ValueError(f"the adapter is of a {type(config).__name__}, not LoRA")
    start = config.init_lora_weights
    if start not in STARTS_AT_ZERO:
        raise ValueError(
            f"the adapter was initialised with {start!r}, which does not start at the base model"
        )
