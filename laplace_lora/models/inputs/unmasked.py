"""Texts that look padded where no attention mask says what is text: which, and refusing them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
    run = _shortest_padding(pad, config)
    if ids.shape[-1] < run:
        return
    is_pad = ids == pad
    if bool((is_pad[..., :run].all(-1) | is_pad[..., -run:].all(-1)).any()):
        raise ValueError(
            f"texts begin or end with the padding token ({pad}), and no '{prefix}{MASK}' says that "
            f"it is padding: {why}. Give the batch the tokenizer's mask, or one of ones if these "
            "tokens are text"
        )


def apparent_mask(batch: Any, config: Any) -> Tensor | None:
    """Return the mask of a batch, or that of what looks like text where there is none.

    Args:
        batch: As for `check_is_masked`, which refuses what this mask leaves out.
        config: The transformer's configuration; ``None`` if it has none.

    Returns:
        As ``input_ids``, not 0 at text; ``None`` where there is neither a mask nor a padding token.
        A text of nothing but that token is a text.
    """
    if not isinstance(batch, Mapping):
        return None
    mask, ids, pad = batch.get(MASK), batch.get(IDS), padding_token(config)
    if mask is not None:
        return mask if isinstance(mask, Tensor) else None
    if pad is None or not isinstance(ids, Tensor) or ids.ndim < 2 or not ids.numel():
        return None
    is_text, run = ids != pad, _shortest_padding(pad, config)
    places = torch.arange(ids.shape[-1], device=ids.device)
    first = is_text.int().argmax(-1, keepdim=True)
    last = places[-1] - is_text.flip(-1).int().argmax(-1, keepdim=True)
    return (places > first - run) & (places < last + run)


def _shortest_padding(pad: int, config: Any) -> int:
    """Return how many padding tokens at a text's end are padding: two where one may end it."""
    ends: Any = getattr(text_config(config), "eos_token_id", None)
    return 2 if pad in (ends if isinstance(ends, list) else [ends]) else 1
