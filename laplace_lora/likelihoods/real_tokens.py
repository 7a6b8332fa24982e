"""Which tokens of a batch's texts are real, by its attention mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def real_tokens_of(batch: Mapping[str, Any], key: str = "input_ids") -> Tensor:
    """Return which tokens of texts are no padding, ``(batch, tokens)``.

    Args:
        batch: What the model takes, with ``attention_mask`` if anything is padded.
        key: Where the tokens are, ``(batch, tokens, …)``.

    Raises:
        TypeError: If tokens or mask are lists or arrays.
        ValueError: If the mask has not one entry per token.
    """
    tokens, mask = batch[key], batch.get("attention_mask")
    for name, value in ((key, tokens), ("attention_mask", mask)):
        if not isinstance(value, Tensor | None):
            raise TypeError(
                f"{name!r} of the batch is a {type(value).__name__}, no tensor; tokenize with "
                "padding=True, return_tensors='pt'"
            )
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} does not say which of the "
            f"{tuple(tokens.shape[:2])} tokens are padding; give one entry per token, as a "
            "tokenizer does"
        )
    real: Tensor = mask.to(tokens.device) != 0
    return real
