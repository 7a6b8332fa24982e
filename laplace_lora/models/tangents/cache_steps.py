"""Whether a model's steps from its cache are right where padding stands before a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import coarsest_dtype
from laplace_lora.models.tangents.tangent_cache import cache_of
from laplace_lora.models.tolerances import near


@torch.no_grad()
def is_right_beside_padding(
    model: Any, text: Tensor, argument: str, others: Mapping[str, Tensor]
) -> bool:
    """Return whether a step from the cache is what the whole text gives.

    Models that count positions by themselves may do so otherwise with a cache: RoBERTa's decoders
    count real tokens without one, and padding as well with one.

    Args:
        model: A decoder.
        text: One token of padding and two others, ``(1, 3)``.
        argument: The name under which the model takes its cache.
        others: What else it takes of the text.
    """
    real = torch.tensor([[0, 1, 1]], device=text.device)
    with as_called():
        whole = model(input_ids=text, attention_mask=real, use_cache=False, **others)
        start = model(input_ids=text[:, :2], attention_mask=real[:, :2], use_cache=True, **others)
        cache = {argument: cache_of(start), "use_cache": True}
        step = model(input_ids=text[:, 2:], attention_mask=real, **cache, **others)
    return near(step.logits[:, -1], whole.logits[:, -1], coarsest_dtype(model))
