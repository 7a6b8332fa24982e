"""The settings that an adapter's function depends on and no weight holds."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from peft import PeftType
from peft.tuners.lora import LoraConfig
from torch import nn

from laplace_lora.adapters.layer_settings import adapter_settings
from laplace_lora.adapters.model_settings import OF_MODEL, model_settings
from laplace_lora.adapters.plain_names import active_adapters

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
        *("ensure_weight_tying", "kasa_config", "megatron_config", "megatron_core"),
        *("final_warmup", "mask_interval", "use_asa", "velora_config"),
        *("svd_threshold", "use_dynamic_rank"),
        # what files hold, and where memory is
        *("runtime_offload_base_weight", "save_indices", "save_only_topk_weights"),
        *("save_precomputed_indices", "save_projection"),
    )
)
# LoRA's are in tensors' shapes and `adapter_settings`, which adapters that are swapped in change.
OF_LORA = {"alpha_pattern", "lora_alpha", "r", "rank_pattern", "use_dora", "use_rslora"}
READ_TASKS = (PeftType.POLY, PeftType.MULTITASK_PROMPT_TUNING)
ASIDE_PARTS = ("asa_", "dropout", "init")
# What no pass reads without another setting: details of OFT and PSOFT, and PVeRA's noise
ONLY_WITH = {
    "eps": "coft",
    "cayley_neumann_eps": "use_cayley_neumann",
    "num_cayley_neumann_terms": "use_cayley_neumann",
    "generator_seed": "sample_at_inference",
}
OF_CONFIGURATION = "peft_config."
SEEDS = ("seed", "prng")  # in the names of settings that only say what is drawn


def active_configurations(model: nn.Module) -> list[Any]:
    """Return the configurations of a model's active adapters."""
    return list(configurations_of(configured(model), active_adapters(model)))


def configured(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model that hold adapters' configurations."""
    return [m for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)]


def configurations_of(holders: Iterable[Any], adapters: Collection[str]) -> Iterator[Any]:
    """Yield the configurations that modules hold now, each of them once.

    Args:
        holders: What `configured` returned.
        adapters: The adapters' names.
    """
    known: set[int] = set()
    for holder in holders:
        for name, config in getattr(holder, "peft_config", {}).items():
            if name in adapters and id(config) not in known:
                known.add(id(config))
                yield config


def reads_tasks(model: nn.Module) -> bool:
    """Return whether an active adapter must be told each text's task."""
    return any(config.peft_type in READ_TASKS for config in active_configurations(model))


def settings_of(configs: Iterable[Any]) -> dict[str, Any]:
    """Return the settings that may change what adapters compute, as JSON has them."""
    return {
        name: json.loads(json.dumps(getattr(config, name), default=_plain))
        for config in configs
        if is_dataclass(config)
        for name in sorted(field.name for field in fields(config))
        if _counts(config, name)
    }


def _counts(config: Any, name: str) -> bool:
    aside = ASIDE | OF_LORA if isinstance(config, LoraConfig) else ASIDE
    if not getattr(config, ONLY_WITH.get(name, "peft_type"), True):
        return False
    return name not in aside and not any(part in name for part in ASIDE_PARTS)


def _plain(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value, key=str)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return type(value).__name__


def function_settings(model: nn.Module) -> dict[str, Any]:
    """Return `adapter_settings` and, behind `OF_CONFIGURATION`, the settings of the configuration.

    PEFT reads some of them in each pass, as Activated LoRA's tokens. And behind `OF_MODEL` those of
    the transformer's configuration, some of which it reads in each pass, too.
    """
    settings = settings_of(active_configurations(model))
    named = {f"{OF_CONFIGURATION}{name}": value for name, value in settings.items()}
    of_model = {f"{OF_MODEL}{name}": value for name, value in model_settings(model).items()}
    return {**adapter_settings(model), **named, **of_model}
