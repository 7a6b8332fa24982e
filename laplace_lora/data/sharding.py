"""Weights that several processes hold in pieces, as `torch.distributed.fsdp.fully_shard` cuts them.

Everything the package knows of sharded tensors is here. A sharded tensor is read whole by all
processes together; a forward or backward pass of a sharded model is a collective, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

M = TypeVar("M", bound=nn.Module)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor's values, detached; all processes call it for one that is sharded."""
    tensor = tensor.detach()
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded_tensor(tensor) else tensor


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Return whether processes hold a tensor in pieces."""
    return isinstance(tensor, DTensor)


def is_sharded_model(model: nn.Module) -> bool:
    """Return whether processes hold pieces of a model, so that they run it together."""
    return any(isinstance(m, FSDPModule) for m in model.modules()) or any(
        map(is_sharded_tensor, model.parameters())
    )


def local_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, without a copy."""
    tensor = tensor.detach()
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded_tensor(tensor) else tensor


@torch.no_grad()
def write_values(tensor: Tensor, values: Tensor) -> None:
    """Overwrite a tensor in place, in its own dtype; each process writes the piece it holds.

    Weights that a model has run with are written here alone: a caller's autocast keeps copies of
    them in half precision until its block ends, and does not look whether they have changed.

    Args:
        tensor: The tensor.
        values: Values of its shape, in pieces as it is; or whole ones, the same in all processes.
            The tensor itself, if they have been written.
    """
    if is_sharded_tensor(tensor):
        sharded: Any = tensor
        if not is_sharded_tensor(values):
            # All have the same values already, so none are sent.
            values = values.to(local_part(tensor))
            place = (sharded.device_mesh, sharded.placements)
            values = distribute_tensor(values, *place, src_data_rank=None)
        local_part(tensor).copy_(local_part(values))
    elif values is not tensor:
        tensor.copy_(values)
    torch.clear_autocast_cache()


def refuse_tensor_parallel(model: nn.Module) -> None:
    """Refuse layers that a tensor-parallel plan has divided among processes.

    Raises:
        TypeError: If there are any.
    """
    sizes = [getattr(module, "_tp_size", None) or 1 for module in model.modules()]
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    divided = [p for p in model.parameters() if isinstance(p, DTensor)]
    # FSDP divides a tensor along one dimension of the mesh; a plan along one more, or without FSDP.
    twice = any(sum(not each.is_replicate() for each in p.placements) > 1 for p in divided)
    if max(sizes, default=1) > 1 or twice or (divided and not by_fsdp):
        raise TypeError(
            "the model's layers are divided among processes by a tensor-parallel plan (tp_plan), "
            "so none sees a layer's whole inputs and gradients; load it without tp_plan, and "
            "shard it with torch.distributed.fsdp.fully_shard if it is too large for one device"
        )


def in_pieces(modules: Iterable[nn.Module]) -> None:
    """Let a sharded model's parameters be those that stay, not those gathered for one pass.

    Some passes leave the latter in their place.
    """
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def gathered_anew(model: nn.Module) -> Iterator[None]:
    """Let every forward pass gather a sharded model's weights, which are being overwritten.

    With ``reshard_after_forward=False`` it would find those of an earlier pass.
    """
    hook = None
    if is_sharded_model(model):
        hook = model.register_forward_pre_hook(lambda *_: in_pieces(model.modules()))
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()
            in_pieces(model.modules())


def unwrapped(model: M) -> M:
    """Return the model in a wrapper for training in parallel or around a compiled model.

    The first's forward pass is a collective; the second hides which transformer it holds.

    Raises:
        TypeError: If the wrapper has cut the weights to pieces, or it is no model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model must be a PeftModel or another torch module, got {type(model).__name__}; "
            "of a pipeline it is `.model`, and PeftModel.from_pretrained loads an adapter's folder"
        )
    if type(model).__name__ == "FullyShardedDataParallel":
        raise TypeError(
            "the model's weights are sharded in one flat tensor (FSDP version 1); shard it with "
            "torch.distributed.fsdp.fully_shard (fsdp_version: 2 in accelerate), or load it whole"
        )
    if isinstance(model, DistributedDataParallel | DataParallel):
        return unwrapped(cast(M, model.module))
    if type(model).__name__ == "OptimizedModule":
        return unwrapped(cast(M, model._orig_mod))
    return model
