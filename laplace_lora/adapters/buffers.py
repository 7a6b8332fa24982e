"""Find a model's persistent buffers, such as running statistics, on which its outputs depend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from laplace_lora.adapters.peft_state import adapter_tensors
from laplace_lora.adapters.plain_names import plain_names
from laplace_lora.data.sharding import whole

SAMPLES = 4096  # values of a buffer that are looked at: all of a layer's running statistics


@dataclass(frozen=True)
class BufferPlace:
    """Where a buffer is, which may be replaced by another tensor.

    Attributes:
        name: Its name in the model without idle adapters.
        module: Its module.
        key: Its name in the module.
    """

    name: str
    module: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        """The buffer as it is now."""
        return self.module.get_buffer(self.key)

    def samples(self) -> Tensor:
        """Return some of its values in its own dtype, on the CPU; none if it is offloaded."""
        values = whole(self.tensor).flatten()
        if values.device.type == "meta":
            return torch.zeros(0)
        count, last = min(SAMPLES, len(values)), max(len(values) - 1, 0)
        index = torch.linspace(0, last, count, dtype=torch.float64, device="cpu").round().long()
        return values[index.to(values.device)].to("cpu", copy=True)


def buffer_places(model: nn.Module) -> list[BufferPlace]:
    """Return where a model's persistent floating-point buffers are.

    Left out are those of adapters that are not active, of modules that the active adapter
    replaces, and of layers with packed weights, whose scales are laid out as a kernel needs them.

    Args:
        model: Any module.
    """
    unused, plain = _unused(model), plain_names(model)
    places: list[BufferPlace] = []
    known: set[int] = set()
    for path, module in model.named_modules():
        if _is_packed(module):
            continue
        for key, buffer in module.named_buffers(recurse=False):
            counts = buffer.is_floating_point() and key not in module._non_persistent_buffers_set
            if counts and id(buffer) not in unused | known:
                known.add(id(buffer))
                places.append(BufferPlace(plain(f"{path}.{key}" if path else key), module, key))
    return places


def buffer_values(model: nn.Module) -> dict[str, Tensor]:
    """Return some values of each of these buffers by name, see `BufferPlace.samples`.

    Args:
        model: Any module.
    """
    return {place.name: place.samples() for place in buffer_places(model)}


def _unused(model: nn.Module) -> set[int]:
    """Return the ``id`` of each buffer that no active adapter's outputs depend on."""
    of_adapters = adapter_tensors(model, lambda module: module.named_buffers())
    unused = {key for key, is_active in of_adapters.items() if not is_active}
    for module in model.modules():
        if not isinstance(module, ModulesToSaveWrapper) or module.disable_adapters:
            continue
        if set(module.active_adapters) & set(module.modules_to_save):
            unused |= {id(b) for b in module.original_module.buffers()}
    return unused


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module holds weights as integers, more than a count."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not t.is_floating_point() and t.ndim > 1 for t in own)
