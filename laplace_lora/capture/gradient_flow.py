"""Verify that gradients pass through a model's linear layers, adapted or not.

Kernels that quantise a layer's inputs, too, are made for inference: their outputs carry no
gradient, and autograd leaves out, without a word, what earlier layers do through them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.selection import listed
from laplace_lora.models.changes.thread_hooks import own_hooks


@contextmanager
def gradients_flow(named: Sequence[tuple[str, nn.Module]]) -> Iterator[None]:
    """Refuse linear layers that cut the gradient in the passes within.

    Raises:
        RuntimeError: If there are any; names them.
    """
    cut: dict[str, nn.Module] = {}

    def note(
        name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        x = args[0] if args else None
        if not (torch.is_grad_enabled() and isinstance(x, Tensor) and isinstance(output, Tensor)):
            return  # a model that switches gradients off means it
        if x.requires_grad and not output.requires_grad:
            cut[name] = module

    with own_hooks() as hooks:
        for name, module in named:
            if hasattr(module, "in_features") and hasattr(module, "out_features"):
                hooks.on_output(module, partial(note, name, module), first=True)
        yield
    if cut:
        kinds = sorted({_kind(module) for module in cut.values()})
        raise RuntimeError(
            f"no gradient passes through the layers {listed(list(cut))} ({', '.join(kinds)}), as "
            "where inputs are quantised, too: the adapters of earlier layers would seem to have "
            "less effect than they have. Quantise the weights alone (with torchao, "
            "Int8WeightOnlyConfig; or 4 bits by bitsandbytes), or load the base model unquantised"
        )


def _kind(module: nn.Module) -> str:
    """Return what a layer and its weight are."""
    weight = getattr(module, "weight", None)
    kind = type(module).__name__
    return f"{kind} of {type(weight).__name__}" if isinstance(weight, Tensor) else kind
