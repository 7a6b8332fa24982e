"""Models whose layers see several rows of an example, and loops that know which are whose."""

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    BertForMultipleChoice,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    DebertaV2Config,
    DebertaV2ForMultipleChoice,
    RobertaConfig,
    RobertaForMultipleChoice,
    SwinConfig,
    SwinForImageClassification,
    Swinv2Config,
    Swinv2ForImageClassification,
)

from laplace_lora import LogitsModel
from support.batches import images, rows
from support.models import PAD, VOCABULARY, bert_config, excite

CHOICES = [[5, 3, 4], [2, 6, 3], [4, 4, 1], [6, 2, 5], [3, 3, 3]]  # tokens of each choice


def _swin(kind=SwinConfig):
    sizes = {"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "window_size": 2}
    return kind(image_size=16, patch_size=2, num_labels=3, **sizes)


def _convnext(kind=ConvNextConfig):
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    return kind(image_size=16, patch_size=2, num_labels=3, **sizes)


KINDS = {
    "bert": (BertForMultipleChoice, bert_config, ["query", "value"]),
    "roberta": (
        RobertaForMultipleChoice,
        lambda: bert_config(RobertaConfig),
        ["query", "value"],
    ),
    "deberta": (
        DebertaV2ForMultipleChoice,
        lambda: bert_config(DebertaV2Config),
        ["query_proj", "value_proj"],
    ),
    "swin": (SwinForImageClassification, _swin, ["q_proj", "v_proj", "fc1"]),
    "swinv2": (Swinv2ForImageClassification, lambda: _swin(Swinv2Config), ["query", "value"]),
    "convnext": (ConvNextForImageClassification, _convnext, ["pwconv1", "pwconv2"]),
    "convnextv2": (
        ConvNextV2ForImageClassification,
        lambda: _convnext(ConvNextV2Config),
        ["pwconv1", "pwconv2"],
    ),
}
TEXTS, IMAGES = ("bert", "roberta", "deberta"), ("swin", "swinv2", "convnext", "convnextv2")


def model_of(name, lora=LoraConfig, **kwargs):
    torch.manual_seed(0)
    kind, config, modules = KINDS[name]
    options = {"target_modules": modules, "modules_to_save": ["classifier"], **kwargs}
    return excite(get_peft_model(kind(config()), lora(**{"r": 2, **options}))).double()


def wrapped(name, **kwargs):
    return LogitsModel(model_of(name, **kwargs)).eval()


def choice_batch(lengths=CHOICES, pad_to=None, side="right"):
    """Choices whose contents do not depend on the padding."""
    width = pad_to or max(map(max, lengths))
    ids = torch.full((len(lengths), len(lengths[0]), width), PAD)
    mask = torch.zeros_like(ids)
    for n, choices in enumerate(lengths):
        for c, length in enumerate(choices):
            generator = torch.Generator().manual_seed(100 * n + c)
            where = slice(0, length) if side == "right" else slice(width - length, width)
            ids[n, c, where] = torch.randint(1, VOCABULARY, (length,), generator=generator)
            mask[n, c, where] = 1
    labels = torch.arange(len(lengths)) % len(lengths[0])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def batch_of(name):
    return choice_batch() if name in TEXTS else images(4, 16)


def loader_of(batch, batch_size):
    examples = [rows(batch, n) for n in range(len(batch["labels"]))]
    return DataLoader(examples, batch_size=batch_size)


def looped_factors(backend, batch):
    """K-FAC factors of each map from single examples, whose every row and token is its own."""
    model, count = backend.engine.model, len(batch["labels"])
    sums = [[0.0, 0.0] for _ in backend.maps]
    for n in range(count):
        example = rows(batch, slice(n, n + 1))
        real = example.get("attention_mask")
        calls = [[] for _ in backend.maps]
        hooks = [
            linear.module.register_forward_hook(lambda m, a, out, to=to: to.append((a[0], out)))
            for linear, to in zip(backend.maps, calls, strict=True)
        ]
        f = model(example)[0]
        for hook in hooks:
            hook.remove()
        p = f.softmax(-1).detach()
        values, vectors = torch.linalg.eigh(p.diag() - torch.outer(p, p))
        root = vectors * values.clamp(min=0).sqrt()
        for linear, ((a, out),), total in zip(backend.maps, calls, sums, strict=True):
            x = a.detach().reshape(-1, a.shape[-1])
            counted = torch.ones(len(x), dtype=torch.bool)
            if real is not None and len(x) == real.numel():
                counted = real.flatten().bool()
            x = x[counted]
            total[1] = total[1] + x.T @ x / len(x) / count
            for column in root.T:
                (g,) = torch.autograd.grad(f, out, column, retain_graph=True)
                g = g.reshape(-1, g.shape[-1])[counted]
                total[0] = total[0] + g.T @ g
            assert linear.in_features == x.shape[-1]
    return [sums[block.map][:1] if block.is_bias else sums[block.map] for block in backend.blocks]


class FlattenedPairs(nn.Module):
    """A reward model as laplace-torch's documentation builds it: pairs are rows of their own."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, data):
        if data["input_ids"].ndim == 2:
            return self.inner(data["input_ids"], data["attention_mask"]).logits
        for name in ("input_ids", "attention_mask"):
            data[name] = data[name].flatten(0, 1)  # into the caller's mapping
        rewards = self.inner(data["input_ids"], data["attention_mask"]).logits
        return rewards.reshape(-1, 2)
