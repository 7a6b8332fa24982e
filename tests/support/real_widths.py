"""One layer at the widths of real models: flattened weights of more than 2²⁴ entries."""

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from laplace_lora import KronLoraLaplace

# Single precision cannot count the entries of these: it rounds the last index up.
SIZES = {"vocabulary": (49152, 576), "hidden": (2048, 4096)}


def wide_model(name):
    """A decoder of one layer with a vocabulary or a hidden size as real ones have it."""
    vocabulary, hidden = SIZES[name]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden + 16,
        num_hidden_layers=1,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    lora = LoraConfig(r=8, target_modules=["q_proj", "down_proj", "lm_head"])
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.02)
    return model


def wide_loader(name, seed, count=4):
    """Texts whose tokens come from all of the vocabulary, its last one included."""
    vocabulary, _ = SIZES[name]
    ids = torch.randint(1, vocabulary, (count, 5), generator=torch.Generator().manual_seed(seed))
    ids[0, 0] = vocabulary - 1
    labels = torch.arange(count) % 3
    mask = torch.ones(5, dtype=torch.long)
    rows = zip(ids, labels, strict=True)
    return DataLoader(
        [{"input_ids": row, "attention_mask": mask, "labels": y} for row, y in rows], batch_size=2
    )


def answers(name):
    """The last token of the vocabulary is one of the answers."""
    return [7, SIZES[name][0] - 1, 13]


def wide_posterior(name, model=None):
    model = wide_model(name) if model is None else model
    return KronLoraLaplace(model, "classification", target_ids=answers(name), factor_rank=8)


def reloaded(folder):
    """What a new process predicts with the posterior saved in each size's folder."""
    found = {}
    for name in SIZES:
        la = KronLoraLaplace.from_pretrained(wide_model(name), folder / name)
        found[name] = la(next(iter(wide_loader(name, 2))))
    torch.save(found, folder / "reloaded.pt")
