"""The parts of an adapter that PEFT draws or computes anew, and no file of weights holds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from laplace_lora.adapters.peft_state import adapter_of
from laplace_lora.adapters.plain_names import active_adapters, adapts, plain_names

WAVES = 8
SAMPLED = 2**18  # numbers of a tensor
NEAR = 0.01  # of the norm
# OSF subtracts the product of these, which is the same with other signs of the singular vectors and
# follows from the base model, which has a fingerprint. So do copies of trained tokens' embeddings.
FROM_THE_BASE = ("_osf_", "original")
# PSOFT's projections follow from it, too, but the signs of their vectors count: one of 128 that is
# turned is 0.09 of the norm. A base model in bfloat16 turns them by less, or over.
LOOSELY = {"_psoft_": 0.05}


def drawn_parts(model: nn.Module) -> dict[str, Any]:
    """Return a summary of each tensor of the active adapter that PEFT makes anew: no weight.

    Indices and projections, drawn from a seed or without one. Tensors that follow from the base
    model alone are left out.

    Returns:
        By name, what `are_drawn_alike` compares.
    """
    name_of = plain_names(model)
    known: set[int] = set()
    found = {}
    for path, name, tensor in (*_of_layers(model), *_of_tuners(model)):
        is_computed = any(part in name for part in FROM_THE_BASE)
        if id(tensor) not in known and tensor.device.type != "meta" and not is_computed:
            known.add(id(tensor))  # VeRA's layers share their projections
            found[name_of(f"{path}.{name}")] = _summary(tensor)
    return found


def _of_layers(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and adapts(layer):
            for name, tensor in _of_layer(layer):
                yield path, name, tensor


def _of_layer(layer: BaseTunerLayer) -> Iterator[tuple[str, Tensor]]:
    for name, held in vars(layer).items():
        for adapter in layer.active_adapters:
            tensor = held.get(adapter) if isinstance(held, dict) else None
            # A single number is a factor, see `adapter_settings`.
            if isinstance(tensor, Tensor) and tensor.ndim:
                yield f"{name}.{adapter}", tensor
    for name, buffer in layer.named_buffers():
        holder, _, key = name.rpartition(".")
        is_active = adapter_of(layer, name) in layer.active_adapters
        if is_active and not _is_known(layer.get_submodule(holder), key):
            yield name, buffer


def _of_tuners(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yield what layers share and do not hold as buffers: FRoD's indices and projections."""
    active = active_adapters(model)
    for path, module in model.named_modules():
        if isinstance(module, BufferDict):
            holder, _, own = path.rpartition(".")
            for adapter, buffer in module.named_buffers(recurse=False):
                if adapter in active and not _is_known(module, adapter):
                    yield holder, f"{own}.{adapter}", buffer


def _is_known(holder: nn.Module, key: str) -> bool:
    """Return whether a buffer is among those of which files have a fingerprint already."""
    is_saved = key not in holder._non_persistent_buffers_set
    return is_saved and holder.get_buffer(key).is_floating_point()


@torch.no_grad()
def _summary(tensor: Tensor) -> Any:
    """Return a hash of integers, or a norm and sums of a sample weighted by waves.

    Devices round differently, and a model may come back in another dtype.
    """
    values = tensor.detach().flatten()
    if not values.is_floating_point():
        return hashlib.sha256(values.cpu().long().numpy().tobytes()).hexdigest()[:16]
    count = min(len(values), SAMPLED)
    # No whole steps, which would fall on the same columns of a matrix.
    steps = torch.arange(count, device=values.device) * (len(values) - 1) // max(count - 1, 1)
    sample = values[steps].cpu().double()
    places = torch.arange(1, count + 1, dtype=torch.float64)
    sums = [float(sample @ (places * n).cos()) for n in range(1, WAVES + 1)]
    return [float(sample.norm()), *sums]


def are_drawn_alike(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether what `drawn_parts` returned is the same, of tensors that both sides know."""
    return all(_is_near(name, then[name], now[name]) for name in then if name in now)


def _is_near(name: str, then: Any, now: Any) -> bool:
    if isinstance(then, str) or isinstance(now, str):
        return bool(then == now)
    near = next((near for part, near in LOOSELY.items() if part in name), NEAR)
    return all(abs(a - b) <= near * max(then[0], now[0]) for a, b in zip(then, now, strict=True))
