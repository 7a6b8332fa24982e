"""`before_adapter`: a model as it was before its LoRA adapter had learnt anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from laplace_lora.adapters.start import zero_at_start
from laplace_lora.data.sharding import in_pieces
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.models.twins import in_place, twin_of


@contextmanager
def before_adapter(
    model: nn.Module,
) -> Iterator[tuple[nn.Module, Callable[[], AbstractContextManager[None]]]]:
    """Yield a model in which what LoRA starts with at zero is zero, and when it is so.

    The base model answers, with a trained head where there is one. That is a twin's state, see
    `twin_of`, and the model itself is not changed. One that cannot have a twin is yielded itself,
    and is at the start only inside the context that the second value makes.

    Args:
        model: Any module with a LoRA adapter.

    Raises:
        ValueError: If the adapter's start is not known, see `zero_at_start`.
    """
    in_pieces(model)
    zero = zero_at_start(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with evaluation_mode(model):
        twin, own = twin_of(model, trainable)
        if twin is None:
            yield model, lambda: _zeroed(model, zero)
            return
        starts = {id(parameter) for parameter in zero}
        for parameter, copy in zip(trainable, own, strict=True):
            if id(parameter) in starts:
                torch.nn.init.zeros_(copy)
        yield twin, nullcontext


@contextmanager
def _zeroed(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    with in_place(model, parameters):
        for parameter in parameters:
            torch.nn.init.zeros_(parameter)
        yield
