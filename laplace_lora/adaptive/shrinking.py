"""Shrink a parameter where it stands, for all who hold it: modules, optimisers, posteriors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from laplace_lora.adaptive.ivon import ivon_of


def shrink(p: nn.Parameter, keep: Tensor, dim: int, optimizer: Optimizer | None = None) -> None:
    """Keep some rows or columns of a parameter, its gradient, and an optimiser's state of it.

    The object stays, so whoever holds it sees the new values. A graph of before, such as that of a
    loss that is still referenced, is no obstacle to the next one.

    Args:
        p: The parameter.
        keep: Which to keep, booleans ``(p.shape[dim],)``.
        dim: 0 for rows, 1 for columns.
        optimizer: Its optimiser, see `check_optimizer`. All of its tensors that have the
            parameter's shape shrink, too, as do the gradients that an `IVON` has collected.
    """
    index = keep.nonzero().view(-1).to(p.device)

    def kept(values: Tensor) -> Tensor:
        return values.index_select(dim, index).clone()

    shape, data, grad = p.shape, kept(p.data), p.grad
    p.grad = None
    # An old graph keeps the node that gradients of the old shape flow into. A parameter forgets
    # that node when its dtype changes, as in `Module.to`, but not when only its shape does.
    p.data = data.new_empty(0, dtype=torch.float32 if data.dtype.itemsize > 4 else torch.float64)
    p.data = data
    torch.clear_autocast_cache()  # of its copies, see `write_values`
    if p.numel() == 0:
        p.requires_grad_(False)
    p.grad = None if grad is None else kept(grad)
    state = {} if optimizer is None else optimizer.state.get(p, {})
    for name, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            state[name] = kept(value)
    ivon = ivon_of(optimizer)
    if ivon is not None and p in ivon.collected:
        sums = ivon.collected[p]
        sums.gradients, sums.products = kept(sums.gradients), kept(sums.products)


def check_optimizer(optimizer: object) -> None:
    """Refuse an optimiser whose state cannot shrink with its parameters.

    Args:
        optimizer: An optimiser, or one in a wrapper that shows its state; ``None`` for none.

    Raises:
        TypeError: If it is something else, such as a list of optimisers.
        ValueError: If its state of a parameter has values beside those of single weights, as
            factored optimisers have, or is quantised, with a scale for many weights at once; if
            another optimiser within it holds the state, as in `ZeroRedundancyOptimizer`.
        RuntimeError: If it is an `IVON` with a draw in place.
    """
    if optimizer is None:
        return
    every: Any = getattr(optimizer, "state", None)
    if not isinstance(every, Mapping):
        raise TypeError(f"optimizer must be one optimiser, got {type(optimizer).__name__}")
    ivon = ivon_of(optimizer)
    if ivon is not None and ivon.is_drawn:  # of drawn weights none is zero
        raise RuntimeError("drawn weights are in place; restore() the optimiser's mean first")
    if not every and getattr(getattr(optimizer, "optim", None), "state", None):
        raise ValueError(
            f"the state of {type(optimizer).__name__} is in another optimiser within it, and would "
            "not shrink; leave `optimizer` out, and make a new one after pruning"
        )
    for p, state in every.items():
        for name, value in state.items() if isinstance(p, Tensor) else ():
            if not _shrinks(value, p):
                kind = type(getattr(optimizer, "optimizer", optimizer)).__name__
                raise ValueError(
                    f"the state of {kind} cannot shrink with the adapter: its {name!r} is not a "
                    "floating-point number for each weight, as those of factored and quantised "
                    "optimisers are not; leave `optimizer` out, and make a new one after pruning"
                )


def _shrinks(value: Any, p: Tensor) -> bool:
    """Return whether part of an optimiser's state has no values, one, or one for each weight."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return all(_shrinks(part, p.new_empty(())) for part in value)
    if not isinstance(value, Tensor) or value.numel() == 1:
        return True
    # A quantised tensor may be of a class that shows a floating-point dtype.
    return value.shape == p.shape and value.is_floating_point() and type(value) is type(p.data)
