"""Refuse trainable tensors that lie in the memory of another tensor: one weight, counted as two.

PEFT's ``ensure_weight_tying`` makes LoRA on an output head out of views of LoRA on the embedding.
Autograd knows nothing of that, and gives each of the two a gradient of its own.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor, nn

from laplace_lora.adapters.selection import is_trained

Named = tuple[str, nn.Parameter]


def check_own_memory(model: nn.Module) -> None:
    """Refuse a model in which a trainable tensor shares memory with another tensor.

    A tensor that several modules hold is one tensor, and not meant here.

    Raises:
        ValueError: If there is one; names the two.
    """
    by_storage: dict[tuple[torch.device, torch.dtype, int], list[Named]] = {}
    for name, p in model.named_parameters():
        # Subclasses of tensors, such as those of sharded models, may have no memory to ask for.
        if type(p) is nn.Parameter and p.device.type != "meta" and p.numel():
            storage = (p.device, p.dtype, p.untyped_storage().data_ptr())
            by_storage.setdefault(storage, []).append((name, p))
    for group in by_storage.values():
        for (name, p), (other_name, other) in combinations(group, 2):
            if (is_trained(p) or is_trained(other)) and _overlap(p, other):
                raise ValueError(
                    f"the parameters {name!r} and {other_name!r} share their memory, as PEFT's "
                    "`ensure_weight_tying` has it: a posterior would take one weight for two. Give "
                    "such tensors memory of their own, which changes no output: after each loading "
                    "of the adapter, `p = model.get_parameter(name); p.data = p.data.clone()`"
                )


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors in one storage have an entry in common."""
    (first, last), (other_first, other_last) = _extent(one), _extent(other)
    if last < other_first or other_last < first:
        return False
    return bool(torch.isin(_offsets(one), _offsets(other)).any())


def _extent(t: Tensor) -> tuple[int, int]:
    """Return the places of a tensor's first and last entry in its storage."""
    first = int(t.storage_offset())
    steps = zip(t.shape, t.stride(), strict=True)
    return first, first + sum(int((size - 1) * stride) for size, stride in steps)


def _offsets(t: Tensor) -> Tensor:
    """Return the place of each entry of a tensor in its storage."""
    first, last = _extent(t)
    places = torch.arange(first, last + 1, device="cpu")
    return places.as_strided(t.shape, t.stride()).flatten()
