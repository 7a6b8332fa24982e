"""Which trainable tensors share a prior precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

PriorStructure = str | Callable[[str], Hashable]

STRUCTURES = ("scalar", "layerwise", "matrix", "block")


def prior_groups(names: Sequence[str], structure: PriorStructure) -> Tensor:
    """Return the group of each trainable tensor.

    Args:
        names: Names of the tensors, in parameter order.
        structure: ``"scalar"``, one for all; ``"layerwise"``, one per tensor; ``"matrix"``,
            one for all ``lora_A``, one for all ``lora_B``, one for what else is trained (heads);
            ``"block"``, one per transformer block and one for what stands outside; or a function
            from a tensor's name to the name of its group.

    Returns:
        Group indices, shape ``(tensors,)``, in the order of first appearance.

    Raises:
        ValueError: If the structure is none of these.
    """
    if callable(structure):
        label = structure
    elif structure in STRUCTURES:
        label = {
            "scalar": lambda name: "all",
            "layerwise": lambda name: name,
            "matrix": _matrix,
            "block": _block,
        }[structure]
    else:
        raise ValueError(
            f"prior_structure must be 'auto', one of {STRUCTURES} or a function from a tensor's "
            f"name to its group, got {structure!r}"
        )
    seen: dict[Hashable, int] = {}
    return torch.tensor([seen.setdefault(label(name), len(seen)) for name in names])


def _matrix(name: str) -> str:
    return next((part for part in ("lora_A", "lora_B") if part in name), "head")


def _block(name: str) -> str:
    block = re.search(r"\.(\d+)\.", name)
    return block.group(0) if block else "outside"
