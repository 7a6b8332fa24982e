"""Speech models that read samples: which frames of their layers are real."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def frame_masks(model: object) -> Callable[[Tensor], Tensor] | None:
    """Return what turns a mask of samples into one of frames; ``None`` for other models.

    The model is asked itself: Wav2Vec2 and its kin (HuBERT, WavLM, SEW, Data2Vec) say how many
    frames samples make.

    Args:
        model: Any module, or a function.

    Returns:
        From ``(batch, samples)`` to ``(batch, frames)``.
    """
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        lengths: Any = getattr(module, "_get_feat_extract_output_lengths", None)
        masks: Any = getattr(module, "_get_feature_vector_attention_mask", None)
        if callable(lengths) and callable(masks):
            return lambda mask: masks(int(lengths(mask.shape[1])), mask)
    return None
