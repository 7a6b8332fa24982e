"""Models that train tensors without Kronecker factors: norms, embeddings, magnitudes."""

import torch
from peft import LoraConfig, get_peft_model

from laplace_lora import LogitsModel
from support.models import SHARING, TARGETS, base_model, excite, peft_model


def model_with_norms(name, **kwargs):
    """A model whose norms and position embeddings are trained whole, beside adapters."""
    model = peft_model(name, **kwargs)
    for key, parameter in model.named_parameters():
        if any(part in key for part in ("norm", "Norm", "ln_", "position_emb", "relative_att")):
            parameter.requires_grad_(True)
    return excite(model)


def dora_model(name):
    """DoRA with positive magnitudes, which are trained."""
    model = peft_model(name, use_dora=True)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "magnitude" in key:
                parameter.abs_().add_(0.5)
    return model


def deberta_model():
    """LoRA on layers that DeBERTa calls on inputs of different shapes."""
    _, _, modules, heads = SHARING["deberta"]
    config = LoraConfig(r=2, target_modules=modules, modules_to_save=heads)
    return excite(get_peft_model(base_model("deberta"), config)).double()


UNCOVERED = {
    "norms of bert": lambda: model_with_norms("bert"),
    "norms of llama": lambda: model_with_norms("llama"),
    "norms of gpt2": lambda: model_with_norms("gpt2"),
    "norms and relative biases of t5": lambda: model_with_norms("t5-lm"),
    "dora": lambda: dora_model("bert"),
    "dora on embeddings": lambda: peft_model(
        "bert", target_modules=["word_embeddings", "query"], use_dora=True
    ),
    "deberta": deberta_model,
}


def uncovered_model(key):
    return LogitsModel(UNCOVERED[key](), target_ids=TARGETS if key.endswith("t5") else None).eval()
