"""Recognise what a model computes beside its weights: settings, and an adapter's drawn parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from laplace_lora.adapters.configuration import SEEDS, active_configurations, settings_of
from laplace_lora.adapters.drawn_parts import are_drawn_alike, drawn_parts
from laplace_lora.adapters.layer_settings import (
    adapter_settings,
    base_dtypes,
    single,
    without_factor,
)
from laplace_lora.adapters.model_settings import model_settings
from laplace_lora.display.warning import warn
from laplace_lora.storage.files import checksum

SETTINGS = "adapter_settings"
LAYERS = "adapter_layers"
CONFIGURATION = "adapter_configuration"
DRAWN = "adapter_drawn"
KINDS = "adapter_kinds"  # its layers but for their factors
DTYPES = "adapter_base_dtypes"
MODEL = "base_configuration"
SHOWN = 3  # settings that a warning names


def function_identity(model: nn.Module, plain: bool) -> dict[str, Any]:
    """Return what a posterior must find again of its adapter and base model, but for weights.

    Args:
        model: Its model.
        plain: See `adapter_settings`.
    """
    settings = adapter_settings(model, plain)
    return {
        SETTINGS: checksum(settings),
        LAYERS: checksum({name: single(setting) for name, setting in settings.items()}),
        KINDS: checksum({name: without_factor(setting) for name, setting in settings.items()}),
        CONFIGURATION: settings_of(active_configurations(model)),
        DRAWN: drawn_parts(model),
        DTYPES: base_dtypes(model),
        MODEL: model_settings(model),
    }


def has_layers(saved: Mapping[str, Any], found: Mapping[str, Any]) -> bool:
    """Return whether an adapter's layers are set as at the fit, as far as a file tells.

    Files of earlier versions have a hash of factors in double precision, and of none where they
    are tensors: compiled models that swap adapters keep them so, in single precision.
    """
    if LAYERS in saved:
        return bool(saved[LAYERS] == found[LAYERS])
    return SETTINGS not in saved or saved[SETTINGS] in (found[SETTINGS], found[KINDS])


def other_dtype(saved: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Say that a base model is in another dtype than at the fit, where a file knows of one."""
    then, now = saved.get(DTYPES), found[DTYPES]
    if not then or then == now:
        return ""
    return (
        f"; the base model was in {', '.join(then)} and is in {', '.join(now)}: "
        "load the base model in the dtype of the fit"
    )


def check_function(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Refuse an adapter that computes something else than at the fit, as far as a file tells.

    Warns:
        UserWarning: If the base model's configuration has other settings than at the fit.

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
            "or computed anew since the posterior was fitted"
            + (other_dtype(saved, found) or f"; {advice}")
        )
    if not has_layers(saved, found):
        raise ValueError(
            "the adapter's configuration differs from the one that the posterior was fitted with "
            "(lora_alpha, use_rslora, use_dora or the layers' scaling)"
        )
    _point_out_settings(saved.get(MODEL, {}), found[MODEL])  # earlier versions saved none


def _point_out_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn that a base model's configuration is another one; versions rename what it has."""
    others = [name for name in then if name in now and then[name] != now[name]]
    if others:
        shown = [f"{name} is {now[name]!r} and was {then[name]!r}" for name in others[:SHOWN]]
        more = [f"and {len(others) - SHOWN} more"] if len(others) > SHOWN else []
        differences = ", ".join([*shown, *more])
        warn(
            "the base model's configuration differs from the one that the posterior was fitted "
            f"with ({differences}), so the model may compute something else from the same weights, "
            "and the curvature be another function's. Load the base model with the configuration "
            "of the fit, or fit again"
        )
