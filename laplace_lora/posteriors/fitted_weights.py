"""A model's tensors beside those at which a posterior was fitted: equal, held or rounded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from laplace_lora.data.sharding import is_sharded_tensor, whole
from laplace_lora.structures.posterior import Posterior

ROUNDING = 1e-5  # relative: adding a number and subtracting it again leaves as much


def pairs_of(posterior: Posterior) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield each tensor's name, its value in the model and that of the fit."""
    engine = posterior.engine
    means = posterior.mean.split(posterior.state.sizes)  # a tensor may have been pruned since
    yield from zip(engine.names, engine.parameters, means, strict=True)
    split = posterior.last_layer
    if split is not None:
        split.check_adapter()  # another adapter may have another head, or none
        weight, bias = posterior.source.head_tensors()
        yield "last layer", weight, split.head.weight.detach()
        if bias is not None:
            yield "last layer's bias", bias, split.head.bias.detach()


@torch.no_grad()
def are_held(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> bool:
    """Return whether tensors have the values of the fit, bit for bit, see `pairs_of`.

    Written to through ``.data``, a tensor keeps its version. Of tensors in pieces versions have to
    do: to compare them, processes would send each other all pieces at every call.
    """
    device = pairs[0][2].device
    if device.type == "meta" or any(is_sharded_tensor(now) for _, now, _ in pairs):
        return True
    if any(now.numel() != then.numel() for _, now, then in pairs):
        return False
    same = [
        (now.to(device).flatten() == then.to(device, now.dtype).flatten()).all()
        for _, now, then in pairs
    ]
    return bool(torch.stack(same).all())  # an accelerator is waited for once


@torch.no_grad()
def rounding_of(pairs: Sequence[tuple[str, Tensor, Tensor]]) -> float:
    """Return how far tensors in a coarser dtype are from those of the fit, relative to their norm.

    Args:
        pairs: Tensors that are equal but for rounding, see `pairs_of`.
    """
    errors, norms = 0.0, 0.0
    for _, now, then in pairs:
        if "meta" in (now.device.type, then.device.type):
            continue
        norms += float(then.double().norm()) ** 2
        if torch.finfo(now.dtype).eps > torch.finfo(then.dtype).eps:
            rounded = whole(now).flatten().to(then)
            errors += float((rounded - then.flatten()).double().norm()) ** 2
    return float((errors / norms) ** 0.5) if errors else 0.0


@torch.no_grad()
def are_equal(now: Tensor, then: Tensor, rounding: float = ROUNDING) -> bool:
    """Return whether two tensors are equal in the dtype of the first, but for rounding."""
    if "meta" in (now.device.type, then.device.type):
        return True  # there are no values
    if now.numel() != then.numel():
        return False
    then = then.reshape(now.shape).to(now)
    if bool(((now == then) | (now.isnan() & then.isnan())).all()):
        return True
    return bool((now.double() - then.double()).norm() <= rounding * then.double().norm())
