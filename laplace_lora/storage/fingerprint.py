"""Fingerprints of tensors: hashes of their names, shapes and values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from laplace_lora.adapters.frozen_values import buffer_places
from laplace_lora.adapters.packed_weights import half_bytes, is_packed, tensor_parts
from laplace_lora.data.sharding import whole

SAMPLES = 64  # values hashed of each tensor of a base model


def exact_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and all values, rounded to float32.

    Args:
        tensors: Names and tensors, in order.
    """
    return hashed((name, t.shape, whole(t).float().flatten()) for name, t in tensors)


def sampled_fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a hash of names, shapes and what `seen_parts` sees of each tensor.

    A checkpoint loaded in single precision and in bfloat16 has one fingerprint; in float16 it may
    have another, see `base_samples`.

    Args:
        tensors: Names and tensors, in order.
    """
    return hashed((name, shape, values) for name, shape, values, _ in seen_parts(tensors))


def seen_parts(
    tensors: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, torch.Size, Tensor, torch.dtype]]:
    """Yield name, shape, a few evenly spaced values in bfloat16 and dtype of each tensor.

    Quantised weights are counted by their half bytes, as integers: how these are laid out changes
    with use; those of tensor subclasses are seen in their parts, see `tensor_parts`. Of offloaded
    tensors there is nothing to see but names and shapes.

    Args:
        tensors: Names and tensors, in order.
    """
    parts = (part for name, t in tensors for part in tensor_parts(name, whole(t)))
    for name, t in parts:
        if not is_packed(t):
            values = torch.zeros(0) if t.device.type == "meta" else _sampled(t)
            yield name, t.shape, values, t.dtype
            continue
        octets = torch.Size([t.numel() * t.element_size()])
        yield name, octets, half_bytes(t), t.dtype


def _sampled(t: Tensor) -> Tensor:
    flat = t.detach().flatten()
    last = max(len(flat) - 1, 0)
    index = torch.linspace(0, last, min(SAMPLES, len(flat)), device=t.device).round().long()
    # Single precision rounds the last index up beyond 2**24 entries. Double precision would
    # pick other entries, and so refuse the files of earlier versions.
    return flat[index.clamp(max=last)].to(torch.bfloat16).float()


def buffer_fingerprint(model: nn.Module) -> str:
    """Return a hash of names, shapes and values of a model's buffers, see `buffer_places`.

    Values are rounded to bfloat16, as those of a base model are.
    """
    return hashed(
        (place.name, place.shape, place.samples().to(torch.bfloat16).float())
        for place in buffer_places(model)
    )


def hashed(parts: Iterable[tuple[str, torch.Size, Tensor]]) -> str:
    """Return a hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name, shape, values in parts:
        digest.update(f"{name} {list(shape)}\n".encode())
        digest.update(values.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
