"""Weights and buffers on which a model's outputs depend, and which a curvature does not cover.

Persistent buffers are running statistics and the like.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from laplace_lora.adapters.packed_weights import half_bytes, packed_parts
from laplace_lora.adapters.peft_state import (
    adapter_parameters,
    adapter_tensors,
    replaced_parameters,
)
from laplace_lora.adapters.plain_names import adapts, plain_names
from laplace_lora.data.sharding import is_sharded_tensor, whole

# Values that are looked at: all of a layer's running statistics; what trains or loads a weight
# changes all of it.
OF_A_BUFFER, OF_A_WEIGHT = 4096, 256


@dataclass(frozen=True)
class TensorPlace:
    """Where a buffer or a weight is, which may be replaced by another tensor.

    Attributes:
        name: Its name in the model without idle adapters.
        module: Its module.
        key: Its name in the module.
        count: How many of its values are looked at.
    """

    name: str
    module: nn.Module
    key: str
    count: int = OF_A_BUFFER

    @property
    def tensor(self) -> Tensor | None:
        """The tensor as it is now; ``None`` if it was taken away."""
        return getattr(self.module, self.key, None)

    @property
    def shape(self) -> torch.Size:
        """The tensor's shape; that of a single number if it was taken away."""
        return torch.Size() if self.tensor is None else self.tensor.shape

    @property
    def is_buffer(self) -> bool:
        """Whether it is a buffer."""
        return self.key in self.module._buffers

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Return some of its values in its own dtype, on the CPU; none if it is offloaded."""
        tensor = self.tensor
        if tensor is None or tensor.device.type == "meta":
            return torch.zeros(0)
        values = whole(tensor).flatten()
        count, last = min(self.count, len(values)), max(len(values) - 1, 0)
        index = torch.linspace(0, last, count, dtype=torch.float64, device="cpu").round().long()
        return values[index.to(values.device)].to("cpu", copy=True)


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
            places.append(kind(plain(name), model.get_submodule(path), key, OF_A_WEIGHT))
    return places


def frozen_values(model: nn.Module, covered: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return some values of each of these tensors by name, see `TensorPlace.samples`."""
    return {place.name: place.samples() for place in frozen_places(model, covered)}


def buffer_places(model: nn.Module) -> list[TensorPlace]:
    """Return where a model's persistent floating-point buffers are.

    Left out are those of adapters that are not active, of modules that the active adapter
    replaces, and of layers with packed weights, whose scales are laid out as a kernel needs them.
    """
    unused, plain = _unused(model), plain_names(model)
    places: list[TensorPlace] = []
    known: set[int] = set()
    for path, module in model.named_modules():
        if _is_packed(module):
            continue
        for key, buffer in module.named_buffers(recurse=False):
            counts = buffer.is_floating_point() and key not in module._non_persistent_buffers_set
            if counts and id(buffer) not in unused | known:
                known.add(id(buffer))
                places.append(TensorPlace(plain(f"{path}.{key}" if path else key), module, key))
    return places


def _unused(model: nn.Module) -> set[int]:
    """Return the ``id`` of each buffer that no active adapter's outputs depend on."""
    of_adapters = adapter_tensors(model, lambda module: module.named_buffers())
    unused = {key for key, is_active in of_adapters.items() if not is_active}
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper) or module.disable_adapters:
            continue
        if adapts(module):
            unused |= {id(b) for b in module.original_module.buffers()}
    return unused


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module holds weights as integers, more than a count."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not t.is_floating_point() and t.ndim > 1 for t in own)


def _is_plain(weight: nn.Parameter) -> bool:
    """Return whether a weight's numbers lie in it as they are."""
    is_of_torch = type(weight) is nn.Parameter and type(weight.data) is Tensor
    return is_of_torch and weight.is_floating_point()
