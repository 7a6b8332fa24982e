"""What an adapter's function depends on and no weight holds: its settings, and parts drawn once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from laplace_lora.adapters.peft_state import adapter_of, adapter_settings
from laplace_lora.adapters.plain_names import adapts, plain_names

# Any other setting counts: PEFT gets new tuners, and a posterior of one of them must not load
# silently around another function.
ASIDE = frozenset(
    (
        # bookkeeping, and what PEFT fills in
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
        *("progressbar", "runtime_config", "task_type", "tokenizer_kwargs"),
        *("tokenizer_name_or_path", "token_dim", "num_layers", "num_attention_heads"),
        "num_transformer_submodules",
        # which modules are adapted: the names of tensors tell
        *("bias", "exclude_modules", "feedforward_modules", "layers_pattern"),
        *("layers_to_transform", "modules_to_save", "target_modules", "target_parameters"),
        "fan_in_fan_out",
        # how weights start and are trained
        *("auxiliary_loss_weight", "beta1", "beta2", "corda_config", "deltaT", "delora_lambda"),
        *("eva_config", "lambda_pattern", "loftq_config", "lora_ga_config", "orth_reg_weight"),
        *("regularization_alpha", "target_r", "tfinal", "total_step"),
        # what files hold, and where memory is
        *("runtime_offload_base_weight", "save_indices", "save_only_topk_weights"),
        *("save_precomputed_indices", "save_projection"),
    )
)
# LoRA's are in tensors' shapes and `adapter_settings`, which adapters that are swapped in change.
OF_LORA = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora"}
ASIDE_PARTS = ("dropout", "init")
OF_CONFIGURATION = "peft_config."
SEEDS = ("seed", "prng")  # in the names of settings that only say what is drawn
WAVES = 8


def active_configurations(model: nn.Module) -> list[Any]:
    """Return the configurations of a model's active adapters.

    Args:
        model: Any module.
    """
    adapted = BaseTunerLayer | ModulesToSaveWrapper | PeftModel
    holders = (module for module in model.modules() if isinstance(module, adapted))
    active = {adapter for holder in holders for adapter in holder.active_adapters}
    return list(configurations(model, active))


def configurations(model: nn.Module, adapters: Collection[str]) -> Iterator[Any]:
    """Yield the configurations of some adapters of a model, each of them once.

    Args:
        model: Any module.
        adapters: The adapters' names.
    """
    known: set[int] = set()
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict):
            for name, config in configs.items():
                if name in adapters and id(config) not in known:
                    known.add(id(config))
                    yield config


def settings_of(configs: Iterable[Any]) -> dict[str, Any]:
    """Return the settings that may change what adapters compute, as JSON has them.

    Args:
        configs: The adapters' configurations.
    """
    return {
        name: json.loads(json.dumps(getattr(config, name), default=_plain))
        for config in configs
        if is_dataclass(config)
        for name in sorted(field.name for field in fields(config))
        if _counts(config, name)
    }


def _counts(config: Any, name: str) -> bool:
    aside = ASIDE | OF_LORA if isinstance(config, LoraConfig) else ASIDE
    return name not in aside and not any(part in name for part in ASIDE_PARTS)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return type(value).__name__


def function_settings(model: nn.Module) -> dict[str, Any]:
    """Return `adapter_settings` and, behind `OF_CONFIGURATION`, the settings of the configuration.

    PEFT reads some of them in each pass, as Activated LoRA's tokens.

    Args:
        model: Any module.
    """
    settings = settings_of(active_configurations(model))
    named = {f"{OF_CONFIGURATION}{name}": value for name, value in settings.items()}
    return {**adapter_settings(model), **named}


def drawn_parts(model: nn.Module) -> dict[str, Any]:
    """Return a summary of each tensor of the active adapter that PEFT makes anew: no weight.

    Indices and projections, drawn from a seed or without one. Tensors that PEFT copies from the
    base model (``trainable_tokens_original``) are left out.

    Args:
        model: Any module.

    Returns:
        By name, what `are_drawn_alike` compares.
    """
    name_of = plain_names(model)
    known: set[int] = set()
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapts(layer):
            for name, tensor in _drawn(layer):
                if id(tensor) not in known and "original" not in name:
                    known.add(id(tensor))  # VeRA's layers share their projections
                    found[name_of(f"{path}.{name}")] = _summary(tensor)
    return found


def _drawn(layer: BaseTunerLayer) -> Iterator[tuple[str, Tensor]]:
    for name, held in vars(layer).items():
        for adapter in layer.active_adapters:
            tensor = held.get(adapter) if isinstance(held, dict) else None
            # A single number is a factor, see `adapter_settings`.
            if isinstance(tensor, Tensor) and tensor.ndim and tensor.device.type != "meta":
                yield f"{name}.{adapter}", tensor
    for name, buffer in layer.named_buffers():
        holder, _, key = name.rpartition(".")
        is_saved = key not in layer.get_submodule(holder)._non_persistent_buffers_set
        if buffer.device.type == "meta":
            continue
        if not is_saved and adapter_of(layer, name) in layer.active_adapters:
            yield name, buffer


@torch.no_grad()
def _summary(tensor: Tensor) -> Any:
    """Return a hash of integers, or a norm and sums of numbers weighted by waves.

    Devices round differently, and a model may come back in another dtype.
    """
    values = tensor.detach().flatten().cpu()
    if not values.is_floating_point():
        return hashlib.sha256(values.long().numpy().tobytes()).hexdigest()[:16]
    values = values.double()
    places = torch.arange(1, len(values) + 1, dtype=torch.float64)
    sums = [float(values @ (places * n).cos()) for n in range(1, WAVES + 1)]
    return [float(values.norm()), *sums]


def are_drawn_alike(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether what `drawn_parts` returned is the same, of tensors that both sides know.

    Args:
        then: Of one model.
        now: Of another.
    """
    return all(_is_near(then[name], now[name]) for name in then if name in now)


def _is_near(then: Any, now: Any) -> bool:
    if isinstance(then, str) or isinstance(now, str):
        return bool(then == now)
    return all(abs(a - b) <= 0.01 * max(then[0], now[0]) for a, b in zip(then, now, strict=True))
