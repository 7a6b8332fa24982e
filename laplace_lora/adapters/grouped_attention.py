"""Attention of grouped queries that has a forward derivative and repeats no keys.

transformers' plain attention copies every key and value once per query head of a group before it
multiplies. Beside tangents that is most of the memory traffic of a step of generation. Here the
queries of a group are stacked instead (Ainslie et al. 2023, *GQA*, arXiv:2305.13245), and so are
the tangents of all directions: keys and values are read once for all of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library, nn
from torch.autograd import forward_ad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "laplace_lora_grouped"


@library.custom_op("laplace_lora::stacked_matmul", mutates_args=())
def stacked_matmul(left: Tensor, right: Tensor) -> Tensor:
    """Return ``left @ right``, ``(…, rows, columns)``; `vmap` over the left side repeats no right.

    torch's own rule repeats the right side once per entry of the batch in memory. Beside tangents
    that right side is all keys and values of a text, and the batch are the directions.

    Args:
        left: ``(…, rows, d)``.
        right: ``(…, d, columns)``, with the same leading dimensions.
    """
    return left @ right


@stacked_matmul.register_fake
def _like(left: Tensor, right: Tensor) -> Tensor:
    return left @ right


@stacked_matmul.register_vmap
def _batched(
    info: object, in_dims: tuple[int | None, int | None], left: Tensor, right: Tensor
) -> tuple[Tensor, int]:
    of_left, of_right = in_dims
    if of_left is None or of_right is not None:
        left = left if of_left is None else left.movedim(of_left, 0)
        right = right if of_right is None else right.movedim(of_right, 0)
        return left @ right, 0
    stacked = left.movedim(of_left, -3)  # (…, batch, rows, d)
    product = stacked.flatten(-3, -2) @ right
    return product.unflatten(-2, stacked.shape[-3:-1]), product.ndim - 2


def differentiable_attention(model: nn.Module) -> str:
    """Return the name of an attention implementation with a forward derivative.

    Args:
        model: A transformers model.

    Returns:
        That of grouped queries where the configuration counts their groups, else ``"eager"``.
    """
    config: Any = getattr(model, "config", None)
    heads, keys = (
        getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads")
    )
    grouped = isinstance(heads, int) and isinstance(keys, int) and keys <= heads
    # Sinks take part in the softmax beside the keys.
    sinks = any(hasattr(module, "sinks") for module in model.modules())
    known = getattr(model, "_supports_attention_backend", False)
    return NAME if grouped and known and not sinks else "eager"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' implementations do, in evaluation mode.

    Args:
        module: The attention layer.
        query: ``(texts, heads, tokens, d)``.
        key: ``(texts, groups, keys, d)``.
        value: ``(texts, groups, keys, d')``; latent attention has values of another length.
        attention_mask: Added to the scores, ``(texts, 1 or heads, tokens, keys)``; it may depend
            on the weights, as Doge's does.
        scaling: Factor of the scores, ``1/√d`` by default.
        dropout: Not used.
        softcap: Bounds the scores.
        **kwargs: Not used.

    Returns:
        ``(texts, tokens, heads, d')``, and nothing for the weights.
    """
    texts, heads, tokens, d = query.shape
    groups = key.shape[1]
    # Their tangents are None where nothing before them moves.
    (q, q_slope), (k, k_slope), (v, v_slope) = map(forward_ad.unpack_dual, (query, key, value))
    scale = d**-0.5 if scaling is None else scaling

    def stacked(x: Tensor) -> Tensor:
        return x.reshape(texts, groups, heads // groups * tokens, d)

    def unstacked(x: Tensor) -> Tensor:
        return x.reshape(texts, heads, tokens, v.shape[-1]).transpose(1, 2).contiguous()

    def by_group(scores: Tensor, mask: Tensor) -> Tensor:
        size = (heads // groups, tokens)
        mask = mask.unsqueeze(1) if mask.shape[1] == 1 else mask.unflatten(1, (groups, size[0]))
        added: Tensor = scores.unflatten(2, size) + mask
        return added.flatten(2, 3)

    q, keys = stacked(q) * scale, k.transpose(2, 3)
    scores = q @ keys
    slope = _sum(
        None if q_slope is None else stacked_matmul(stacked(q_slope) * scale, keys),
        None if k_slope is None else q @ k_slope.transpose(2, 3),
    )
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores = bounded * softcap
        slope = None if slope is None else slope * (1 - bounded.square())
    if attention_mask is not None:
        mask, mask_slope = forward_ad.unpack_dual(attention_mask)
        scores = by_group(scores, mask)
        if mask_slope is not None:
            slope = by_group(torch.zeros_like(scores) if slope is None else slope, mask_slope)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if slope is not None:
        slope = weights * slope
        slope = (slope - weights * slope.sum(-1, keepdim=True)).to(v.dtype)
    weights = weights.to(v.dtype)
    mixed = unstacked(weights @ v)
    slope = _sum(
        None if slope is None else stacked_matmul(slope, v),
        None if v_slope is None else weights @ v_slope,
    )
    if slope is None:
        return mixed, None
    return forward_ad.make_dual(mixed, unstacked(slope)), None


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


AttentionInterface.register(NAME, grouped_attention)
AttentionMaskInterface.register(NAME, eager_mask)
