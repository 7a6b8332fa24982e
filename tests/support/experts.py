"""A tiny mixture of experts with LoRA on their stacked weights."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForSequenceClassification

from support.models import PAD, VOCABULARY, excite


def experts_model(dtype=torch.float64):
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=PAD,
        num_labels=3,
    )
    base = MixtralForSequenceClassification(config)
    base.config._experts_implementation = "eager"  # the fused kernels take no float64
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=names)
    return excite(get_peft_model(base, lora)).to(dtype).eval()
