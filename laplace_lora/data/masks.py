"""Which tokens of a layer's input are real, by the attention masks of a batch.

Which batch belongs to which call of a layer is `tape`'s to know, what masked rows are worth
`kfac`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

MASK_NAMES = ("attention_mask", "decoder_attention_mask")


def token_mask(batch: Any, inputs: Tensor, name: str) -> Tensor | None:
    """Return which tokens of a map's input are real.

    Args:
        batch: Mapping with ``attention_mask`` or ``decoder_attention_mask``; anything else has
            no padding.
        inputs: Input of the map, ``(batch, tokens, q)`` or ``(batch, q)``.
        name: Name of the map, for the error.

    Returns:
        The ``(batch, tokens)`` mask that fits the input, ``None`` if all tokens are real.

    Raises:
        ValueError: If there are masks, but none fits.
    """
    if inputs.ndim == 2 or inputs.shape[1] == 1 or not isinstance(batch, Mapping):
        return None
    found = [batch.get(key) for key in MASK_NAMES]
    masks: list[Tensor] = [mask for mask in found if mask is not None]
    if not masks:
        return None
    for mask in masks:
        if mask.shape == inputs.shape[:2]:
            mask = mask.to(inputs.device).bool()
            return None if bool(mask.all()) else mask
    raise ValueError(
        f"layer {name!r} saw {inputs.shape[1]} tokens an example, but the batch's attention masks "
        f"have the shapes {[tuple(mask.shape) for mask in masks]}, so padding cannot be told apart"
    )


def joined_masks(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Return the masks of several inputs, one after the other; ``None`` if all tokens are real."""
    if all(mask is None for _, mask in parts):
        return None
    real = [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in parts]
    return torch.cat(real, dim=1)
