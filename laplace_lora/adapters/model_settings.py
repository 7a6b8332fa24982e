"""The settings that a transformer's function depends on and no weight holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, TypeAlias

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

Holders: TypeAlias = list[tuple[str, Any]]

OF_MODEL = "config."
ATTENTION = "attention_type"  # BigBird's modules keep their own, and change it
# Any other setting counts: transformers gets new models, and a posterior of one of them must not
# load silently around another function.
ASIDE = frozenset(
    (
        # bookkeeping, and what tensors tell
        *("architectures", "auto_map", "id2label", "label2id", "model_type", "name_or_path"),
        *("num_labels", "task_specific_params", "finetuning_task", "tokenizer_class", "vocab_size"),
        *("quantization_config", "torch_dtype", "dtype", "use_bfloat16", "tie_word_embeddings"),
        # how a pass is computed, and what it returns beside its outputs
        *("chunk_size_feed_forward", "deterministic_flash_attn", "disable_custom_kernels"),
        *("gradient_checkpointing", "output_attentions", "output_hidden_states", "pretraining_tp"),
        *("output_router_logits", "reference_compile", "repad_logits_with_grad", "return_dict"),
        *("torchscript", "use_mamba_kernels", "ignore_keys_at_rope_validation"),
        # losses, and special tokens that no pass looks for
        *("problem_type", "label_smoothing", "apply_spec_augment", "max_length"),
        *("bos_token_id", "cls_token_id", "mask_token_id", "sep_token_id", "unk_token_id"),
        # what is read by `generate` and in pretraining alone
        *("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "suppress_tokens"),
        *("begin_suppress_tokens", "bad_words_ids", "prefix", "median_filter_width"),
        *("num_negatives", "use_mambapy"),
    )
)
ASIDE_PARTS = (
    *("dropout", "pdrop", "layerdrop", "drop_path", "drop_rate", "drop_connect", "init", "loss"),
    *("mask_time", "mask_feature", "cache", "implementation", "version"),
)
PAD, END = "pad_token_id", "eos_token_id"


def model_settings(model: nn.Module) -> dict[str, Any]:
    """Return the settings that may change what a model computes, as JSON has them."""
    return held_settings(config_holders(model))


def config_holders(model: nn.Module) -> Holders:
    """Return the transformers within a model, with their names."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, PreTrainedModel)]


def held_settings(holders: Holders) -> dict[str, Any]:
    """Return the settings that transformers have now, each configuration's once.

    The outermost configuration's come by their plain names, those of others, as the copies that
    encoder-decoders make, behind the names of their modules.

    Args:
        holders: What `config_holders` returned.
    """
    # Such a classifier reads the last token before the padding, an encoder-decoder's the last end.
    classifies = any("SequenceClassification" in type(module).__name__ for _, module in holders)
    found: dict[str, Any] = {}
    kinds: list[Any] = []
    known: set[int] = set()
    for name, module in holders:
        if id(module.config) not in known:
            prefix = f"{name}." if known else ""
            found |= _settings(module.config, prefix, classifies, known)
        if ATTENTION in vars(module):
            kinds.append(_plain(vars(module)[ATTENTION]))
    return {**found, ATTENTION: kinds[0]} if kinds else found


def _settings(
    config: PretrainedConfig, prefix: str, classifies: bool, known: set[int]
) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a configuration, and of those in it; notes which these are."""
    known.add(id(config))
    for name, value in vars(config).items():
        if _is_aside(name) or not _counts(config, name, value, classifies):
            continue
        if isinstance(value, PretrainedConfig):
            if id(value) not in known:
                yield from _settings(value, f"{prefix}{name}.", classifies, known)
        else:
            yield from _flat(f"{prefix}{name}", value)


@cache
def _is_aside(name: str) -> bool:
    return name[0] == "_" or name in ASIDE or any(part in name for part in ASIDE_PARTS)


def _counts(config: PretrainedConfig, name: str, value: Any, classifies: bool) -> bool:
    """Return whether a special token matters to a model; any other setting does."""
    if name == PAD:  # the trainer sets it where there is none
        return classifies and value is not None
    return name != END or (classifies and bool(getattr(config, "is_encoder_decoder", False)))


def _flat(name: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Return a setting, or those that it consists of, as rotary embeddings' do."""
    if not isinstance(value, Mapping):
        return [(name, _plain(value))]
    return [pair for key, part in value.items() for pair in _flat(f"{name}.{key}", part)]


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__
