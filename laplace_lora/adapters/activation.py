"""Which tensors of a PEFT adapter are trainable: set right where loading left it wrong."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from peft import PeftModel
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.cartridge import CartridgeEncoder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from laplace_lora.adapters.peft_state import adapter_parameters
from laplace_lora.adapters.selection import listed
from laplace_lora.display.warning import warn

logger = logging.getLogger(__name__)


def activate_adapter(model: nn.Module) -> None:
    """Make the active adapter of a `PeftModel` loaded for inference trainable.

    Does nothing if any tensor is trainable already, other than what PEFT leaves so when it loads.

    Args:
        model: Any module; only a `PeftModel` is changed.
    """
    left = _left_trainable(model) if isinstance(model, PeftModel) else set()
    freeze_untrainable(model)
    if not isinstance(model, PeftModel):
        return
    if any(p.requires_grad and id(p) not in left for p in model.parameters()):
        return
    adapters = list(model.active_adapters)
    if len(adapters) != 1:
        return  # `trainable_maps` refuses several adapters with an explanation
    model.set_adapter(adapters[0])
    # PEFT leaves a cartridge frozen that was loaded, and loads none as trainable.
    encoders = getattr(model, "prompt_encoder", ())
    if adapters[0] in encoders and isinstance(encoders[adapters[0]], CartridgeEncoder):
        encoders[adapters[0]].trainable_embedding.requires_grad_(True)
    freeze_untrainable(model)
    count = sum(p.requires_grad for p in model.parameters())
    logger.info("made the %d tensors of adapter %r trainable", count, adapters[0])


def _left_trainable(model: PeftModel) -> set[int]:
    """Return the ``id`` of each tensor that PEFT leaves trainable where it loads for inference.

    Those of prompts, of SHADOW's own small model, the biases that were trained with an adapter
    (``bias="all"``), and what it casts; what was trained with them is frozen.
    """
    name = model.active_adapter
    config = model.peft_config[name]
    if not config.inference_mode:
        return set()
    holders = (
        getattr(model, "prompt_encoder", {}),
        getattr(model.base_model, "shadow_backbone", {}),
    )
    left = {id(p) for holder in holders if name in holder for p in holder[name].parameters()}
    biases = _biases_left_trainable(model, getattr(config, "bias", "none"))
    return left | biases | _cast_left_trainable(model, name)


def _cast_left_trainable(model: nn.Module, adapter: str) -> set[int]:
    """Return the ``id`` of each tensor that casting an adapter leaves trainable.

    Around a base model in half precision PEFT puts casts into its dictionaries of parameters,
    which make trainable parameters of them; those in dictionaries of modules it keeps frozen. If
    any has been frozen since, there are none: someone has chosen.
    """
    layers = (m for m in model.modules() if isinstance(m, BaseTunerLayer))
    held = (m for layer in layers for m in layer.modules() if isinstance(m, nn.ParameterDict))
    cast = [parameters[adapter] for parameters in held if adapter in parameters]
    return {id(p) for p in cast} if all(p.requires_grad for p in cast) else set()


def _biases_left_trainable(model: nn.Module, bias: str) -> set[int]:
    """Return the ``id`` of each bias that an adapter's configuration leaves trainable."""
    if bias == "none":
        return set()
    if bias != "all":  # those of the adapted layers
        adapted = (m.get_base_layer() for m in model.modules() if isinstance(m, BaseTunerLayer))
        return {id(layer.bias) for layer in adapted if getattr(layer, "bias", None) is not None}
    copies = _trained_copies(model)
    biases = (p for name, p in model.named_parameters() if name.endswith(".bias"))
    return {id(p) for p in biases} - copies  # LoRA's own among them (``lora_bias``)


def _trained_copies(model: nn.Module) -> set[int]:
    """Return the ``id`` of each tensor of modules that were trained whole, with an adapter."""
    wrappers = (m for m in model.modules() if isinstance(m, ModulesToSaveWrapper))
    return {id(p) for wrapper in wrappers for p in wrapper.modules_to_save.parameters()}


def point_out_frozen_adapter(model: nn.Module) -> None:
    """Warn of an adapter that runs and is frozen in a model of which other tensors are trainable.

    Whether a `PeftModel` inside a network of one's own is to stay frozen, or was merely loaded for
    inference, nothing tells; nor with an adapter that transformers has loaded, which leaves a head
    trainable that was trained with it.

    Warns:
        UserWarning: If there is such an adapter; names the trainable tensors.
    """
    copies = _trained_copies(model)
    is_active = adapter_parameters(model)
    adapted = [p for p in model.parameters() if is_active.get(id(p)) and id(p) not in copies]
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    if trained and adapted and not any(p.requires_grad for p in adapted):
        warn(
            f"the adapter is frozen, and the posterior covers only {listed(trained)}. If the "
            "adapter was loaded for inference, make it trainable first: call `set_adapter(name)` "
            "of the model that it was loaded into, or load it with is_trainable=True"
        )


def freeze_untrainable(model: nn.Module) -> None:
    """Freeze what AdaLoRA wrongly marks as trainable: its rank counts, and empty pruned tensors.

    PEFT makes ``ranknum`` trainable when the base model is in half precision.
    """
    for layer in adalora_layers(model).values():
        triplet = [p for part in (layer.lora_A, layer.lora_E, layer.lora_B) for p in part.values()]
        for parameter in [*layer.ranknum.values(), *(p for p in triplet if p.numel() == 0)]:
            parameter.requires_grad_(False)


def adalora_layers(model: nn.Module) -> dict[str, AdaLoraLayer]:
    """Return the layers that AdaLoRA adapts, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if isinstance(module, AdaLoraLayer)}


def kept_triplets(pattern: Mapping[str, list[bool]], layer: str, adapter: str) -> list[bool] | None:
    """Return which triplets of a layer a rank pattern keeps; ``None`` if it does not say.

    Args:
        pattern: As AdaLoRA's configuration holds it; a saved one does not name the adapter.
        layer: Name in the model inside PEFT's `AdaLoraModel`.
        adapter: The adapter's name.
    """
    name = f"{layer}.lora_E"
    return pattern.get(f"{name}.{adapter}", pattern.get(name))
