"""Which tokens of a batch's texts are real, by its attention mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def real_tokens_of(
    batch: Any, task: str, labels: str = "'labels'", keys: Sequence[str] = ("input_ids",)
) -> Tensor:
    """Return which tokens of texts are no padding, ``(batch, tokens)``.

    Args:
        batch: What the model takes, with ``attention_mask`` if anything is padded.
        task: What reads the texts, for the error.
        labels: What batches have beside them, likewise.
        keys: Where the tokens may be, ``(batch, tokens, …)``.

    Raises:
        TypeError: If the batch is no mapping of texts, or tokens or mask are lists or arrays.
        ValueError: If the mask has not one entry per token.
    """
    key = next((k for k in keys if isinstance(batch, Mapping) and k in batch), None)
    if key is None:
        raise TypeError(
            f"{task} needs batches as Hugging Face's collators make them: mappings with "
            f"'input_ids', 'attention_mask' and {labels}"
        )
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
