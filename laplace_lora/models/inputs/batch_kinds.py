"""Kinds of batches, by what decides how many passes of a model one takes, see `data.steps`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_lora.data.batches import Batch, model_inputs, splits_by_example
from laplace_lora.data.steps import Kind
from laplace_lora.models.inputs.image_rows import MEDIA, has_images, texts_with_images


def kind_of(batch: Batch, config: Any) -> Kind:
    """Return a batch's kind; ``None`` if its images are not one of each text.

    Batches of one form have the same inputs, as many outputs, and images of the same shapes, so
    that the same parts of a model run. Padding, before texts and elsewhere, and a single example
    are examined when they are first met.
    """
    x = model_inputs(batch)
    named = x if isinstance(x, Mapping) else {"": x}
    tensors = [(str(name), v) for name, v in named.items() if isinstance(v, Tensor)]
    with_images = has_images(batch)
    if with_images and not bool(texts_with_images(batch, config).all()):
        return None
    form = sorted(
        (name, v.ndim, *(v.shape if with_images and MEDIA.match(name) else _choices(name, v)))
        for name, v in tensors
    )
    padded = sorted(
        (name, bool((v[..., 0] == 0).any()), bool((v == 0).any()))
        for name, v in tensors
        if "mask" in name and v.ndim and v.numel()
    )
    return tuple(form), (splits_by_example(x, 1), tuple(padded))


def _choices(name: str, x: Tensor) -> tuple[int, ...]:
    """Return what is between a tensor's examples and its tokens, such as a number of choices."""
    return tuple(x.shape[1 : -2 if name.endswith("embeds") else -1])
