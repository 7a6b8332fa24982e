"""Batches and loaders of token sequences and images."""

import torch
from torch.utils.data import DataLoader

from support.models import PAD, VOCABULARY

LENGTHS = (3, 6, 4, 6, 1, 5, 2)


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
    """Take the examples at an index or slice."""
    return {key: value[index] for key, value in batch.items()}


def split_rows(batch: dict) -> list[dict]:
    """Take the examples one by one."""
    return [rows(batch, n) for n in range(len(batch["labels"]))]


def loader(batch_size=3, lengths=LENGTHS, likelihood="classification", **kwargs):
    """Seven labelled sequences, unless other lengths are given."""
    batch = token_batch(lengths, **kwargs)
    if likelihood == "regression":
        generator = torch.Generator().manual_seed(0)
        batch["labels"] = torch.randn(len(lengths), 3, generator=generator)
    return DataLoader(split_rows(batch), batch_size=batch_size)


def validation(batch_size=3):
    """Sequences that no posterior is fitted on."""
    return loader(batch_size, lengths=(4, 6, 2, 5, 3, 6, 1, 4), seed=7)


def images(count=4, size=16):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return {"pixel_values": pixels, "labels": torch.arange(count) % 3}
