"""Refuse texts that look padded where no attention mask says what is text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_lora.models.inputs.configs import text_config

IDS, MASK = "input_ids", "attention_mask"


def padding_token(config: Any) -> int | None:
    """Return the number of a model's padding token, ``None`` if its configuration names none.

    Args:
        config: The transformer's configuration, or ``None``.
    """
    token: int | None = getattr(text_config(config), "pad_token_id", None)
    return token


def check_is_masked(batch: Any, config: Any, why: str, decoder: bool = False) -> None:
    """Refuse texts without a mask that begin or end with the model's padding token.

    Where that token also ends texts, as GPT-2's does, one of it is taken for the end of a text.

    Args:
        batch: The model's inputs; what is no mapping with token numbers passes.
        config: The transformer's configuration; ``None`` if it has none.
        why: What goes wrong without a mask.
        decoder: Look at an encoder-decoder's second text, which the padding token may begin.

    Raises:
        ValueError: If there are such texts.
    """
    prefix = "decoder_" if decoder else ""
    if not isinstance(batch, Mapping) or batch.get(prefix + MASK) is not None:
        return
    ids, pad = batch.get(prefix + IDS), padding_token(config)
    if decoder and isinstance(ids, Tensor):
        ids = ids[..., 1:]
    if pad is None or not isinstance(ids, Tensor) or ids.ndim < 2 or not ids.numel():
        return
    ends: Any = getattr(text_config(config), "eos_token_id", None)
    run = 2 if pad in (ends if isinstance(ends, list) else [ends]) else 1
    if ids.shape[-1] < run:
        return
    is_pad = ids == pad
    if bool((is_pad[..., :run].all(-1) | is_pad[..., -run:].all(-1)).any()):
        raise ValueError(
            f"texts begin or end with the padding token ({pad}), and no '{prefix}{MASK}' says that "
            f"it is padding: {why}. Give the batch the tokenizer's mask, or one of ones if these "
            "tokens are text"
        )
