"""Prompts as they are continued: padding on the left, whatever side it was on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def left_padded(inputs: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return token numbers and mask with the padding, wherever it was, on the left.

    Args:
        inputs: A mapping with ``input_ids`` and, if padded, ``attention_mask``; or the token
            numbers alone, ``(texts, tokens)``.
        device: Where to put them.

    Raises:
        ValueError: If there are no prompts, or one is empty.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if not isinstance(ids, Tensor) or ids.ndim != 2 or not ids.numel():
        raise ValueError(
            "prompts are missing: generate needs 'input_ids' of shape (texts, tokens), from a "
            "tokenizer with return_tensors='pt'"
        )
    ids = ids.long()
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    mask = torch.ones_like(ids) if mask is None else (mask != 0).to(ids)
    if not bool(mask.any(1).all()):
        raise ValueError("a prompt has no real token; begin it with the tokenizer's bos token")
    order = mask.argsort(dim=1, stable=True)
    ids, mask = (x.gather(1, order).to(device) for x in (ids, mask))
    return ids.masked_fill(mask == 0, 0), mask
