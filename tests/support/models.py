"""Tiny real architectures built from configs, with trained-looking adapters."""

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from laplace_lora import LogitsModel

VOCABULARY = 50
PAD = 0
TINY = {  # of models like Llama
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": PAD,
}
TARGETS = [7, 11, 13]
ALBERT_ADAPTERS = {
    "lora": LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"]),
    "dora": LoraConfig(r=2, target_modules=["query", "value"], use_dora=True),
    "adalora": AdaLoraConfig(
        init_r=2, target_r=1, total_step=9, tfinal=1, target_modules=["query", "value"]
    ),
}


def llama_config(**kwargs):
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        pad_token_id=PAD,
        **kwargs,
    )


def bert_config(kind=BertConfig, **kwargs):
    kwargs.setdefault("num_hidden_layers", 2)
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=PAD,
        **kwargs,
    )


def deberta_config(**kwargs):
    """Relative attention, which calls the key and query projections twice."""
    return bert_config(
        DebertaV2Config,
        relative_attention=True,
        max_relative_positions=8,
        pos_att_type=["c2p", "p2c"],
        share_att_key=True,
        **kwargs,
    )


def gpt2_config(**kwargs):
    return GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=1,
        **kwargs,
    )


def t5_config(**kwargs):
    return T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=PAD,
        pad_token_id=PAD,
        **kwargs,
    )


ARCHITECTURES = {
    "llama": (LlamaForSequenceClassification, llama_config, ["q_proj", "v_proj"], ["score"]),
    "llama-lm": (LlamaForCausalLM, llama_config, ["q_proj", "v_proj", "down_proj"], None),
    "bert": (BertForSequenceClassification, bert_config, ["query", "value"], ["classifier"]),
    "roberta": (
        RobertaForSequenceClassification,
        lambda **kwargs: bert_config(RobertaConfig, **kwargs),
        ["query", "value"],
        ["classifier"],
    ),
    "gpt2": (GPT2ForSequenceClassification, gpt2_config, ["c_attn"], ["score"]),
    "gpt2-lm": (GPT2LMHeadModel, gpt2_config, ["c_attn", "c_proj"], None),
    "t5-lm": (T5ForConditionalGeneration, t5_config, ["q", "v"], None),
}

SHARING = {  # weight sharing in the forward pass, which the curvature refuses
    "deberta": (
        DebertaV2ForSequenceClassification,
        deberta_config,
        ["query_proj", "key_proj", "value_proj"],
        ["classifier"],
    ),
}


def base_model(name: str, num_labels: int = 3, **config) -> nn.Module:
    kind, make_config, _, _ = {**ARCHITECTURES, **SHARING}[name]
    torch.manual_seed(0)
    if not name.endswith("-lm"):
        config["num_labels"] = num_labels
    return kind(make_config(**config))


def adapter_config(name: str, r: int = 2, **kwargs) -> LoraConfig:
    _, _, modules, heads = ARCHITECTURES[name]
    kwargs.setdefault("target_modules", modules)
    kwargs.setdefault("modules_to_save", heads)
    kwargs.setdefault("fan_in_fan_out", name.startswith("gpt2"))
    return LoraConfig(r=r, lora_alpha=4, lora_dropout=0.1, **kwargs)


def peft_model(name: str, num_labels: int = 3, dtype=torch.float64, **kwargs) -> nn.Module:
    """A tiny PEFT model whose adapters are away from their initial zero."""
    model = get_peft_model(base_model(name, num_labels), adapter_config(name, **kwargs))
    return excite(model).to(dtype)


def excite(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Move every trainable tensor somewhere generic, so that no gradient vanishes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(scale * noise.to(parameter))
    return model


def freeze_magnitudes(model: nn.Module) -> nn.Module:
    """Make DoRA's magnitudes positive and freeze them."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            with torch.no_grad():
                parameter.abs_().add_(0.5)
            parameter.requires_grad_(False)
    return model


def adalora_model(name: str, num_labels: int = 3, dtype=torch.float64, **kwargs) -> nn.Module:
    """A tiny AdaLoRA model whose singular values are away from their initial zero."""
    kwargs = {"init_r": 3, "target_r": 2, "total_step": 20, "tfinal": 4, "deltaT": 2, **kwargs}
    kind = "SEQ_CLS" if not name.endswith("-lm") else "CAUSAL_LM"
    _, _, modules, heads = {**ARCHITECTURES, **SHARING}[name]
    config = AdaLoraConfig(
        task_type=kind,
        target_modules=kwargs.pop("target_modules", modules),
        modules_to_save=kwargs.pop("modules_to_save", heads),
        lora_alpha=4,
        lora_dropout=0.1,
        fan_in_fan_out=name.startswith("gpt2"),
        **kwargs,
    )
    return excite(get_peft_model(base_model(name, num_labels), config)).to(dtype)


def logits_model(name, **kwargs):
    targets = TARGETS if name.endswith("-lm") else None
    return LogitsModel(peft_model(name, **kwargs), target_ids=targets).eval()


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 8],
        depths=[1, 1],
        layer_type="basic",
        hidden_act="tanh",
        num_labels=3,
    )
    base = ResNetForImageClassification(config)
    lora = LoraConfig(
        r=2, lora_alpha=4, target_modules=["convolution"], modules_to_save=["classifier.1"]
    )
    return excite(get_peft_model(base, lora)).double()


def albert(kind="lora", layers=3):
    torch.manual_seed(0)
    base = AlbertForSequenceClassification(
        bert_config(AlbertConfig, embedding_size=8, num_hidden_layers=layers, num_labels=3)
    )
    base.set_attn_implementation("eager")
    model = excite(get_peft_model(base, ALBERT_ADAPTERS[kind])).double()
    return LogitsModel(freeze_magnitudes(model)).eval()


def checkpoint_activations(model, use_reentrant=False):
    """Switch gradient checkpointing on, under either of transformers' names for it."""
    base = model.get_base_model()
    enable = getattr(base, "activation_checkpointing_enable", None)  # since 5.23
    if enable is None:
        enable = base.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
