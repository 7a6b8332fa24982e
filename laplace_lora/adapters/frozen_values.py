"""Weights and buffers on which a model's outputs depend, and which a curvature does not cover."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from laplace_lora.adapters.buffers import TensorPlace, buffer_places
from laplace_lora.adapters.packed_weights import half_bytes, packed_parts
from laplace_lora.adapters.peft_state import adapter_parameters, replaced_parameters
from laplace_lora.adapters.plain_names import plain_names
from laplace_lora.data.sharding import is_sharded_tensor

SAMPLES = 256  # values of a weight that are looked at: what trains or loads one changes all of it


class PackedPlace(TensorPlace):
    """Where a packed weight is, whose layout changes with use."""

    def samples(self) -> Tensor:
        """Return how often each half byte occurs in each of its parts, ``(16 parts,)``."""
        tensor = self.tensor
        if tensor is None or is_sharded_tensor(tensor):
            return torch.zeros(0)
        parts = packed_parts(tensor)
        if not parts:  # it was unpacked
            return super().samples()
        if any(part.device.type == "meta" for part in parts):
            return torch.zeros(0)
        return torch.cat([half_bytes(part).cpu() for part in parts])


def frozen_places(model: nn.Module, covered: Iterable[Tensor]) -> list[TensorPlace]:
    """Return where a model's buffers are, see `buffer_places`, and the weights not covered.

    Left out are weights of adapters that are not active and of modules that the active adapter
    replaces, and those that processes hold in pieces.

    Args:
        model: Any module.
        covered: Weights to leave out.
    """
    of_adapters, plain = adapter_parameters(model), plain_names(model)
    left_out = {id(p) for p in covered} | replaced_parameters(model)
    left_out |= {key for key, is_active in of_adapters.items() if not is_active}
    places = buffer_places(model)
    for name, weight in model.named_parameters():
        if id(weight) in left_out or is_sharded_tensor(weight):
            continue
        path, _, key = name.rpartition(".")
        kind = TensorPlace if _is_plain(weight) else PackedPlace
        if kind is TensorPlace or packed_parts(weight):
            places.append(kind(plain(name), model.get_submodule(path), key, SAMPLES))
    return places


def frozen_values(model: nn.Module, covered: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return some values of each of these tensors by name, see `TensorPlace.samples`."""
    return {place.name: place.samples() for place in frozen_places(model, covered)}


def _is_plain(weight: nn.Parameter) -> bool:
    """Return whether a weight's numbers lie in it as they are."""
    is_of_torch = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return is_of_torch and weight.is_floating_point()
