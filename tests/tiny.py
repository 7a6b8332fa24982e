"""Tiny real architectures built from configs, with trained-looking adapters, and their batches."""

from __future__ import annotations

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, jacrev
from transformers import (
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
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 50
PAD = 0
TARGETS = [7, 11, 13]


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
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
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


def token_batch(lengths=(5, 5, 5, 5), pad_to=None, side="right", labels=3, seed=0) -> dict:
    """Sequences of given lengths; content depends on the example alone, not on the padding."""
    width = pad_to or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for n, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + n)
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator)
        where = slice(0, length) if side == "right" else slice(width - length, width)
        ids[n, where], mask[n, where] = tokens, 1
    y = torch.arange(len(lengths)) % labels
    return {"input_ids": ids, "attention_mask": mask, "labels": y}


def rows(batch: dict, index) -> dict:
    return {key: value[index] for key, value in batch.items()}


def assert_near(ours, theirs, tolerance=1e-6):
    """Compare by norm: Llama normalises in single precision, whatever its number format."""
    if isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for x, y in zip(ours, theirs, strict=True):
            assert_near(x, y, tolerance)
        return
    assert ours.shape == theirs.shape
    error, size = (ours - theirs).norm().item(), theirs.norm().item()
    assert error <= tolerance * size + 1e-13, f"error {error:.2e} of {size:.2e}"


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


def explicit_jacobians(model: nn.Module, batch) -> list[torch.Tensor]:
    """Jacobians of every trainable tensor by `torch.func.jacrev`, ``(batch, outputs, *shape)``."""
    transformer = getattr(model.eval(), "model", None)
    if hasattr(transformer, "set_attn_implementation"):
        transformer.set_attn_implementation("eager")
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    return list(jacrev(lambda w: functional_call(model, w, (batch,)))(weights).values())
