"""Adapters as PEFT's own files: which models have them, and writing one."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from laplace_lora.adapters.activation import adalora_layers, kept_triplets
from laplace_lora.data.sharding import is_sharded_model, unwrapped
from laplace_lora.display.warning import warn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"  # PEFT's empty model card
# Their start is subtracted from the base model's weights, once for every adapter that is loaded.
BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")


def check_saves_adapters(model: nn.Module) -> None:
    """Refuse models whose adapter PEFT cannot write to files of their own.

    Raises:
        TypeError: If it is no `PeftModel`.
        ValueError: If processes hold it in pieces, each adapter that is loaded changes the base
            model, or PEFT loads only one of its kind.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PeftModel):
        raise TypeError(
            f"adapters are written by PEFT's PeftModel, got {type(inner).__name__}; wrap the model "
            "with get_peft_model instead of injecting layers into it"
        )
    if is_sharded_model(inner):
        raise ValueError(
            "the model is sharded, and PEFT writes whole adapters; load the posterior around a "
            "whole model and export from there"
        )
    settings = inner.peft_config[inner.active_adapter]
    bias = getattr(settings, "bias", "none")
    if bias != "none":
        raise ValueError(
            f"the adapter was made with bias={bias!r}, and PEFT loads one such adapter at a time, "
            "so that several cannot be served beside each other; train one with bias='none'"
        )
    start = base_changing_start(settings)
    if start is not None:
        raise ValueError(
            f"the adapter was made with init_lora_weights={start!r}, which changes the base model "
            "for every adapter that is loaded, so that several would answer wrongly; convert the "
            "adapter to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion) "
            "and fit a posterior on that, or save the base model as it is now, set "
            "peft_config[...].init_lora_weights = True, and serve with that base model (tune with "
            "method='marglik', as the saved base model is not where training started)"
        )


def point_out_no_mixed_batches(model: nn.Module) -> None:
    """Warn where PEFT runs a batch of several adapters as if all its examples had one.

    Args:
        model: What a `LogitsModel` is around, a `PeftModel`.

    Warns:
        UserWarning: If its tuner does not read ``adapter_names``; names the tuner.
    """
    inner = unwrapped(model)
    assert isinstance(inner, PeftModel)
    # PEFT drops the names without a word where a tuner does not take them to its layers.
    if not hasattr(type(inner.base_model), "_enable_peft_forward_hooks"):
        kind = inner.peft_config[inner.active_adapter].peft_type
        warn(
            f"PEFT's {getattr(kind, 'value', kind)} ignores `adapter_names`, without an error: a "
            "batch of several adapters would be answered by one of them; run the adapters one "
            "after the other, with set_adapter"
        )


def base_changing_start(settings: Any) -> str | None:
    """Return an adapter's start if loading it changes the base model, see `BASE_CHANGING`.

    Args:
        settings: The adapter's configuration.
    """
    start = str(getattr(settings, "init_lora_weights", None))
    return start if start.lower().startswith(BASE_CHANGING) else None


def point_out_cut_layers(model: nn.Module) -> None:
    """Warn where PEFT leaves trained numbers out of a saved adapter: AdaLoRA's pruned triplets.

    Warns:
        UserWarning: If there are any, so that the loaded adapter has other tensors; names a layer.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PeftModel):
        return
    name = inner.active_adapter
    pattern = getattr(inner.peft_config[name], "rank_pattern", None) or {}
    cut = []
    for place, layer in adalora_layers(inner).items():
        path = place.removeprefix("base_model.model.")
        kept = kept_triplets(pattern, path, name)
        if kept is not None and int(sum(kept)) < layer.r[name]:
            cut.append(path)
    if cut:
        warn(
            f"PEFT saves the adapter without the triplets that AdaLoRA has pruned (in {len(cut)} "
            f"layers, e.g. {cut[0]!r}), and this posterior was fitted with them, so it cannot "
            "be loaded with the saved adapter; call remove_pruned_triplets(model), fit again, and "
            "save both"
        )


def folder_of_its_own(model: nn.Module) -> str | None:
    """Return the folder that PEFT makes for the active adapter in the one that it is to write into.

    Args:
        model: What a `LogitsModel` is around.

    Returns:
        The adapter's name, or ``None`` if the adapter is written into the folder itself.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PeftModel) or inner.active_adapter == "default":
        return None
    return str(inner.active_adapter)


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write a `PeftModel`'s active adapter, whatever its name, into a folder of its own.

    Args:
        model: The model.
        folder: The folder, which is not there yet.
    """
    inner = unwrapped(model)
    assert isinstance(inner, PeftModel)
    name = inner.active_adapter
    own = folder_of_its_own(inner)
    with tempfile.TemporaryDirectory(dir=folder.parent) as staged:
        inner.save_pretrained(staged, selected_adapters=[name])
        source = Path(staged) if own is None else Path(staged) / own
        folder.mkdir()
        for file in (CONFIG, WEIGHTS):
            shutil.move(source / file, folder / file)
