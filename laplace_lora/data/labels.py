"""Labels of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of tokens that are not scored


def token_labels(batch: Any, labels: Tensor) -> Tensor:
    """Return the labels that count, `IGNORED` everywhere else.

    A label counts if it is not `IGNORED` and both its token and the token before it, which
    predicts it, are real; so padding on either side changes nothing.

    Args:
        batch: What the model takes: a mapping with ``input_ids`` and, if anything is padded,
            ``attention_mask``.
        labels: As Hugging Face's collators make them, ``(batch, tokens)``: not shifted.

    Returns:
        Shape ``(batch, tokens)``.

    Raises:
        TypeError: If the batch is not such a mapping.
        ValueError: If the labels are not one integer a token.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise TypeError(
            "language modelling needs batches as Hugging Face's collators make them: mappings with "
            "'input_ids', 'attention_mask' and 'labels'"
        )
    ids = batch["input_ids"]
    if labels.shape != ids.shape or labels.is_floating_point():
        raise ValueError(
            f"language modelling needs one integer label a token, shape {tuple(ids.shape)}; got "
            f"{labels.dtype} of shape {tuple(labels.shape)}"
        )
    mask = batch.get("attention_mask")
    real = torch.ones_like(labels) if mask is None else mask.to(labels.device)
    predicted = real.bool().clone()
    predicted[:, 1:] &= predicted[:, :-1].clone()
    predicted[:, 0] = False
    return labels.masked_fill(~predicted, IGNORED)
