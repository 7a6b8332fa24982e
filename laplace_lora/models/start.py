"""`before_adapter`: a model as it was before its LoRA adapter had learnt anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from laplace_lora.adapters.start import zero_at_start
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.models.twins import resampled


@contextmanager
def before_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Yield a twin of a model in which what LoRA starts with at zero is zero.

    The base model answers, with a trained head where there is one. The model itself is not changed,
    see `resampled`.

    Args:
        model: Any module with a LoRA adapter.

    Raises:
        ValueError: If the adapter's start is not known, see `zero_at_start`.
    """
    zero = {id(parameter) for parameter in zero_at_start(model)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluation_mode(model), resampled(model, trainable) as (twin, own):
        for parameter, copy in zip(trainable, own, strict=True):
            if id(parameter) in zero:
                torch.nn.init.zeros_(copy)
        yield twin
