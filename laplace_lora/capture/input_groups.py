"""Which recorded maps got the same input, as the projections of an attention do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

Address: TypeAlias = tuple[Any, ...]


def address(x: Tensor) -> Address:
    """Return where and how a tensor is stored; equal for views of the same values."""
    return (x.device, x.data_ptr(), x.shape, x.stride(), x.dtype)


def addresses(inputs: Sequence[Tensor]) -> Address:
    """Return the addresses of the inputs of a map's calls."""
    return tuple(map(address, inputs))


def input_groups(
    inputs: Sequence[Tensor], sources: Sequence[Sequence[Address] | None], device: torch.device
) -> list[int]:
    """Return for each map the index of the first map with the same input.

    Projections that share their input tensor are recognised by its address. If PEFT casts the input
    to the adapter's dtype, once per projection, the address before the cast names the candidate,
    and equal values confirm it.

    Args:
        inputs: Input of each map.
        sources: Where its layer's inputs lay, call by call; ``None`` if its own are no casts of
            them.
        device: Where what was compared is gathered.
    """
    first: dict[Address, int] = {}
    earlier: dict[Address, int] = {}
    groups: list[int] = []
    uncertain: list[tuple[int, int]] = []  # maps that may share their input with an earlier one
    for i, (x, source) in enumerate(zip(inputs, sources, strict=True)):
        groups.append(first.setdefault(address(x), i))
        if groups[i] == i and source is not None:
            before = tuple(source)
            # Addresses are reused: each is compared with the latest, not with the first.
            if before in earlier:
                uncertain.append((earlier[before], i))
            earlier[before] = i
    # All at once, as an accelerator waits for each answer.
    same = [_are_equal(inputs[i], inputs[k], device) for i, k in uncertain]
    answers = torch.stack(same).tolist() if same else []
    for (earlier_map, i), is_same in zip(uncertain, answers, strict=True):
        if is_same:
            groups[i] = groups[earlier_map]
    return [groups[group] for group in groups]


def _are_equal(x: Tensor, other: Tensor, device: torch.device) -> Tensor:
    """Return whether two inputs hold the same values, as a scalar on a device."""
    if (x.shape, x.dtype, x.device) != (other.shape, other.dtype, other.device):
        return torch.zeros((), dtype=torch.bool, device=device)
    return (x == other).all().to(device)
