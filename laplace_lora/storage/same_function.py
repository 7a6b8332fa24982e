"""Recognise what an adapter computes beside its weights: its settings and the parts drawn once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from laplace_lora.adapters.configuration import (
    SEEDS,
    active_configurations,
    are_drawn_alike,
    drawn_parts,
    settings_of,
)
from laplace_lora.adapters.peft_state import adapter_settings, single

SETTINGS = "adapter_settings"
LAYERS = "adapter_layers"
CONFIGURATION = "adapter_configuration"
DRAWN = "adapter_drawn"


def function_identity(model: nn.Module, plain: bool) -> dict[str, Any]:
    """Return what a posterior must find again of its adapter, but for weights.

    Args:
        model: Its model.
        plain: See `adapter_settings`.
    """
    settings = adapter_settings(model, plain)
    return {
        SETTINGS: _hash(settings),
        LAYERS: _hash({name: single(setting) for name, setting in settings.items()}),
        CONFIGURATION: settings_of(active_configurations(model)),
        DRAWN: drawn_parts(model),
    }


def layers_key(saved: Mapping[str, Any]) -> str:
    """Return under which name a saved identity has its layers' settings.

    Files of earlier versions have a hash of factors in double precision. Compiled models that swap
    adapters keep factors in single precision.
    """
    return LAYERS if LAYERS in saved else SETTINGS


def check_function(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse an adapter that computes something else than at the fit, as far as a file tells.

    Args:
        saved: Identity at the fit, perhaps of an earlier version.
        found: The model's identity.

    Raises:
        ValueError: If its layers, its settings or its drawn parts are others.
    """
    then, now = saved.get(CONFIGURATION, {}), found[CONFIGURATION]
    drawn, drawn_now = saved.get(DRAWN, {}), found[DRAWN]
    others = [name for name in then if name in now and then[name] != now[name]]
    are_alike = are_drawn_alike(drawn, drawn_now)
    if are_alike and drawn.keys() & drawn_now.keys():
        others = [name for name in others if not any(part in name for part in SEEDS)]
    advice = "load the adapter that was saved with the posterior, PeftModel.from_pretrained(...)"
    if others:
        differences = ", ".join(f"{n} is {now[n]!r} and was {then[n]!r}" for n in others)
        raise ValueError(
            "the adapter's configuration differs from the one that the posterior was fitted with "
            f"({differences}); {advice}"
        )
    if not are_alike:
        raise ValueError(
            "parts of the adapter that are no weights (random indices or projections) were drawn "
            f"anew since the posterior was fitted; {advice}"
        )
    key = layers_key(saved)
    if key in saved and saved[key] != found[key]:
        raise ValueError(
            "the adapter's configuration differs from the one that the posterior was fitted with "
            "(lora_alpha, use_rslora, use_dora or the layers' scaling)"
        )


def _hash(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
