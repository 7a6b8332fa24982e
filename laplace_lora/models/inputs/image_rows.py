"""Whether a batch's images, videos and sounds are one of each text's: row by row, or not.

Vision-language models take them in one tensor, in the order in which the texts speak of them. As
many rows as texts may then be two of one text and none of another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.batches import Batch, model_inputs, splits_by_example
from laplace_lora.data.pairs import passes
from laplace_lora.models.inputs.configs import text_config

MEDIA = re.compile(r"pixel_values|image|video|audio|input_(features|values)")
KINDS = ("image", "video", "audio")
PLACEHOLDERS = [f"{kind}_token_{end}" for kind in KINDS for end in ("id", "index")]
OF_TEXTS_DIMS = 6  # (texts, images, tiles, channels, height, width): rows are texts'


def has_images(batch: Batch) -> bool:
    """Return whether a batch has texts with images, videos or sounds beside them."""
    return any(_media(text) for text in passes(model_inputs(batch)))


def texts_with_images(batch: Batch, config: Any) -> Tensor:
    """Return which texts speak of an image, where some do, by their placeholders.

    If all do, as many rows of images as texts are one of each: every text has at least one. Where
    a configuration names no placeholder, or no text holds one, models take an image of each text.

    Returns:
        Shape ``(kinds, texts)``, bool, with a row for images, for videos and for sounds that some
        text speaks of.
    """
    ids = [text["input_ids"] for text in passes(model_inputs(batch)) if _media(text)]
    kinds = [(x == token).flatten(1).any(1) for x in ids for token in placeholders(config)]
    spoken = [texts for texts in kinds if bool(texts.any())]
    return torch.stack(spoken) if spoken else torch.ones(0, 0, dtype=torch.bool)


def placeholders(config: Any) -> set[int]:
    """Return the tokens that stand for images, videos and sounds, as far as they are named.

    Args:
        config: The model's configuration.
    """
    named = [getattr(c, k, None) for c in (config, text_config(config)) for k in PLACEHOLDERS]
    return {token for token in named if isinstance(token, int)}


def divides(batch: Batch, config: Any, examples: int | None = None) -> bool:
    """Return whether every example of a batch has its own row of each tensor.

    Args:
        batch: Any batch.
        config: The model's configuration.
        examples: Number of examples, where it is known.
    """
    return splits_by_example(batch, examples) and bool(texts_with_images(batch, config).all())


def _media(text: Any) -> list[Tensor]:
    """Return the images, videos and sounds beside texts whose rows may be one each."""
    if not isinstance(text, Mapping) or not isinstance(text.get("input_ids"), Tensor):
        return []
    named = [v for k, v in text.items() if MEDIA.match(str(k)) and isinstance(v, Tensor)]
    return [v for v in named if v.is_floating_point() and 1 < v.ndim < OF_TEXTS_DIMS]
