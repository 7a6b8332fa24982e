"""Find which tokens of a layer's input are real, by the attention masks of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from laplace_lora.data.batches import Batch

MASK_NAMES = ("attention_mask", "decoder_attention_mask")
_INDICES = WeakTensorKeyDictionary()


def token_mask(batch: Batch | None, inputs: Tensor, name: str) -> Tensor | None:
    """Return which tokens of a map's input are real.

    Args:
        batch: Mapping with ``attention_mask`` or ``decoder_attention_mask``; any other batch has
            no padding.
        inputs: Input of the map, ``(batch, …, q)`` or ``(batch, q)``; a mask with more than two
            dimensions, as of several choices, has its last one for tokens.
        name: Name of the map, for error messages.

    Returns:
        The ``(batch, tokens)`` mask that fits the input, ``(rows,)`` where every token is a row;
        ``None`` if all tokens are real.

    Raises:
        ValueError: If there are masks, but none fits.
    """
    if not isinstance(batch, Mapping):
        return None
    candidates = [batch.get(key) for key in MASK_NAMES]
    masks: list[Tensor] = [m.reshape(-1, m.shape[-1]) for m in candidates if m is not None]
    if not masks:
        return None
    if inputs.ndim == 2:  # an example a row, unless there is a row for every token
        flat = [mask.flatten() for mask in masks if mask.numel() == len(inputs) != len(mask)]
        return _unless_all(flat[0].to(inputs.device)) if flat else None
    inputs = inputs.flatten(1, -2)
    if inputs.shape[1] == 1:
        return None
    for mask in masks:
        if mask.numel() == len(inputs) != len(mask):  # rows are tokens, by each of their experts
            rows = mask.reshape(-1, 1).expand(inputs.shape[:2])
            return _unless_all(rows.to(inputs.device))
    for mask in masks:
        if mask.shape == inputs.shape[:2]:
            return _unless_all(mask.to(inputs.device))
    raise ValueError(
        f"layer {name!r} received {inputs.shape[1]} tokens per example, but the batch's attention "
        f"masks have the shapes {[tuple(mask.shape) for mask in masks]}, so padding is unknown"
    )


def _unless_all(mask: Tensor) -> Tensor | None:
    mask = mask.bool()
    return None if bool(mask.all()) else mask


def real_rows(x: Tensor, mask: Tensor) -> Tensor:
    """Return what stands at the real tokens, ``x[mask]``, ``(real tokens, …)``.

    Where they are is computed once for a mask: an accelerator waits to learn how many there are.

    Args:
        x: Values at tokens, ``(batch, tokens, …)``.
        mask: Real tokens, ``(batch, tokens)``.
    """
    if mask not in _INDICES:
        _INDICES[mask] = mask.flatten().nonzero().squeeze(1)
    return x.flatten(0, 1).index_select(0, _INDICES[mask])


def joined_masks(parts: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """Return the masks of several inputs, concatenated; ``None`` if all tokens are real."""
    if all(mask is None for _, mask in parts):
        return None
    if len(parts) == 1:
        return parts[0][1]
    real = [x.new_ones(x.shape[:2], dtype=torch.bool) if m is None else m for x, m in parts]
    return torch.cat(real, dim=1)
