"""Tiny mixtures of experts with LoRA on their stacked weights."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForSequenceClassification,
    MixtralConfig,
    MixtralForSequenceClassification,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from support.models import TINY, excite

SIZES = {**TINY, "num_experts_per_tok": 2, "num_labels": 3}
KINDS = {
    "mixtral": (MixtralForSequenceClassification, MixtralConfig, {"num_local_experts": 4}),
    "qwen3": (
        Qwen3MoeForSequenceClassification,
        Qwen3MoeConfig,
        {"num_experts": 4, "moe_intermediate_size": 8},
    ),
    "gpt_oss": (GptOssForSequenceClassification, GptOssConfig, {"num_local_experts": 4}),
}


def experts_model(name="mixtral", parameters=("gate_up_proj", "down_proj"), implementation="eager"):
    """Return an adapted classifier; the fused kernels take no float64."""
    torch.manual_seed(0)
    kind, config, experts = KINDS[name]
    base = kind(config(**SIZES, **experts))
    base.config._experts_implementation = implementation
    names = [f"mlp.experts.{parameter}" for parameter in parameters]
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=names)
    return excite(get_peft_model(base, lora)).double().eval()
