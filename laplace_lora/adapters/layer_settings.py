"""What PEFT's layers compute beside their tensors: their kinds and the factors of their updates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from laplace_lora.adapters.plain_names import adapts, plain_names

FACTOR = 2  # where a layer's setting has the factor of its update


def adapter_settings(model: nn.Module, plain: bool = True) -> dict[str, Any]:
    """Return what an active adapter's configuration changes about its outputs, as plain values.

    The kind of each adapted layer and the factor of its update, which are in no tensor.

    Args:
        model: Any module.
        plain: Whether idle adapters leave no trace; ``False`` lists their layers, too.
    """
    settings: dict[str, Any] = {}
    name_of = plain_names(model) if plain else str
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and (not plain or adapts(layer)):
            name = name_of(path)
            for adapter in layer.active_adapters:
                scaling = getattr(layer, "scaling", {})
                found = scaling.get(adapter) if isinstance(scaling, dict) else None
                variant = getattr(layer, "lora_variant", {}).get(adapter)
                settings[name] = [
                    type(layer).__name__,
                    None if variant is None else type(variant).__name__,
                    _factor(found),
                    bool(getattr(layer, "fan_in_fan_out", False)),
                ]
    return settings


def single(setting: Sequence[Any]) -> list[Any]:
    """Return a layer's setting with its factor in single precision, as PEFT's tensors have it.

    Args:
        setting: One of `adapter_settings`.
    """
    return [torch.tensor(x).float().item() if type(x) is float else x for x in setting]


def without_factor(setting: Sequence[Any]) -> list[Any]:
    """Return a layer's setting with an unknown factor.

    Args:
        setting: One of `adapter_settings`.
    """
    return [*setting[:FACTOR], None, *setting[FACTOR + 1 :]]


def base_dtypes(model: nn.Module) -> list[str]:
    """Return the floating-point dtypes of the weights around which PEFT's layers are."""
    weights = (p for m in tuner_layers(model) for p in m.get_base_layer().parameters(recurse=False))
    return sorted({str(p.dtype) for p in weights if p.is_floating_point()})


def tuner_layers(model: nn.Module) -> list[BaseTunerLayer]:
    """Return PEFT's layers around those of a model, whether their adapters are active or not."""
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def scalings(layers: Iterable[nn.Module]) -> list[dict[str, float]]:
    """Return the factors of the adapters' updates in each layer, where it has any.

    Args:
        layers: What `tuner_layers` returned.
    """
    found = (getattr(layer, "scaling", None) for layer in layers)
    return [
        {name: factor for name, value in each.items() if (factor := _factor(value)) is not None}
        for each in found
        if isinstance(each, dict)
    ]


def _factor(value: Any) -> float | None:
    """Return a layer's factor; PEFT makes it a tensor for compiled models that swap adapters."""
    is_one = isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta"
    return float(value) if is_one or isinstance(value, int | float) else None
