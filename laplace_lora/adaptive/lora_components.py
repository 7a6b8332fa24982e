"""The rank-one components of a plain LoRA adapter, and layers with fewer of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace_lora.adapters.peft_files import base_changing_start
from laplace_lora.adaptive.scores import Components
from laplace_lora.adaptive.shrinking import shrink


def lora_components(peft_model: PeftModel, adapter: str) -> list[Components]:
    """Return the components of an adapter's linear and convolutional layers.

    Args:
        peft_model: A LoRA model.
        adapter: The adapter's name.

    Raises:
        TypeError: If there are none.
        ValueError: If a layer cannot have fewer; names it. Or if PEFT computes from the ranks what
            it subtracts from the base model when it loads the adapter.
    """
    start = base_changing_start(peft_model.peft_config[adapter])
    if start is not None:
        raise ValueError(
            f"the adapter was made with init_lora_weights={start!r}, and PEFT would subtract "
            "another start from the base model for other ranks; convert the adapter to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion) and prune that"
        )
    layers = []
    for name, module in peft_model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer) or isinstance(module, AdaLoraLayer):
            continue
        if adapter not in module.lora_A:
            continue
        if module.use_dora.get(adapter) or module.lora_bias.get(adapter):
            raise ValueError(f"layer {name!r} has a LoRA bias or DoRA magnitude; it cannot shrink")
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if len(A) != module.r[adapter] or B.shape[1] != len(A):
            raise ValueError(
                f"the rank of layer {name!r} is that of several maps, of stacked experts "
                "(target_parameters) or of a convolution's groups; it cannot shrink. Train an "
                "adapter without it"
            )
        layers.append(Components(name, A, B))
    if not layers:
        raise TypeError("the model has neither a LoRA nor an AdaLoRA adapter on linear layers")
    return layers


def shrink_lora(
    peft_model: PeftModel,
    layer: Components,
    adapter: str,
    keep: Tensor,
    optimizer: Optimizer | None,
) -> None:
    """Keep some components of a layer; without any its adapter goes, and others stay.

    Args:
        peft_model: The model.
        layer: The layer's components.
        adapter: The adapter's name.
        keep: Which to keep, booleans ``(r,)``.
        optimizer: See `shrink`.
    """
    model = peft_model.base_model.model
    module: LoraLayer = model.get_submodule(layer.name)
    rank = int(keep.sum())
    shrink(layer.A, keep, 0, optimizer)
    shrink(layer.B, keep, 1, optimizer)
    if rank == 0:  # PEFT has no LoRA of rank zero
        _remove(model, layer.name, module, adapter)
        return
    _set_width(module.lora_A[adapter], "out", rank)
    _set_width(module.lora_B[adapter], "in", rank)
    divisor = math.sqrt(rank) if module.use_rslora.get(adapter) else float(rank)
    module.r[adapter], module.lora_alpha[adapter] = rank, module.scaling[adapter] * divisor


def describe_layers(peft_model: PeftModel, adapter: str) -> None:
    """Describe the layers in an adapter's configuration, so that a saved adapter loads."""
    config, layers = peft_model.peft_config[adapter], _layers_of(peft_model, adapter)
    config.target_modules = set(layers)
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.init_lora_weights = True  # other starts are not to be had for every rank
    config.rank_pattern = {name: layer.r[adapter] for name, layer in layers.items()}
    config.alpha_pattern = {name: layer.lora_alpha[adapter] for name, layer in layers.items()}


def other_layers(peft_model: PeftModel, adapter: str, layers: Iterable[Components]) -> set[str]:
    """Return the names of an adapter's layers that are not among the given ones."""
    return set(_layers_of(peft_model, adapter)) - {layer.name for layer in layers}


def _layers_of(peft_model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    return {
        name: module
        for name, module in peft_model.base_model.model.named_modules()
        if isinstance(module, LoraLayer) and adapter in module.r
    }


def _remove(model: nn.Module, name: str, module: LoraLayer, adapter: str) -> None:
    tensors = (module.lora_A, module.lora_embedding_A)
    if set().union(*tensors) == {adapter}:
        model.set_submodule(name, module.get_base_layer())
        return
    active = list(module.active_adapters)
    module._active_adapter = []  # or the layer would make another adapter the active one
    module.delete_adapter(adapter)
    module._active_adapter = active


def _set_width(module: nn.Module, side: str, rank: int) -> None:
    unit = "features" if hasattr(module, "in_features") else "channels"
    setattr(module, f"{side}_{unit}", rank)
