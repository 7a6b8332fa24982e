"""The head of a transformer: its weights, and what it sees of each example."""

from __future__ import annotations

from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from laplace_lora.data.sharding import whole
from laplace_lora.models.changes.thread_hooks import own_hooks


def n_rows(head: Any) -> int:
    """Return the number of outputs of a head."""
    return _sizes(head)[0]


def _sizes(head: Any) -> tuple[int, int]:
    """Return outputs and inputs; a quantised weight's shape does not tell."""
    shape = head.weight.shape
    own = getattr(head, "out_features", shape[0]), getattr(head, "in_features", shape[-1])
    # PEFT's `ensure_weight_tying` makes a head of an embedding, and names the two sides reversed.
    rows, width = own[::-1] if tuple(shape) == own[::-1] else own
    return int(rows), int(width)


def head_tensors(head: Any, ids: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return weight ``(outputs, d)`` and bias of a linear head, whole and detached.

    Args:
        head: The layer, of a transformer.
        ids: Which rows; ``None`` for all.

    Raises:
        ValueError: If the layer is quantised or offloaded.
    """
    weight = head.weight  # PEFT merges it at each call where it trains some of its rows
    if not weight.is_floating_point() or weight.shape != _sizes(head):
        raise ValueError(
            "the last layer is quantised, but a last-layer posterior needs its weights; leave "
            "it out of the quantisation"
        )
    if weight.device.type == "meta":
        raise ValueError(
            "the last layer is offloaded, but a last-layer posterior needs its weights; give "
            "it a device"
        )
    bias = getattr(head, "bias", None)  # such a head has none, see `TrainableTokensLayer`
    weight, bias = whole(weight), None if bias is None else whole(bias)
    if ids is None:
        return weight, bias
    ids = ids.to(weight.device)
    return weight[ids], None if bias is None else bias[ids]


def last_linear(model: nn.Module, outputs: int | None) -> nn.Linear:
    """Return the last plain linear layer of a model, the active adapter's copy if it was trained.

    Args:
        model: Any module.
        outputs: Outputs it must have; ``None`` for any number.

    Raises:
        ValueError: If there is none.
    """
    idle: set[int] = set()
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            kept = [wrapper.modules_to_save[name] for name in wrapper.active_adapters]
            every = {id(module) for module in wrapper.modules()}
            idle |= every - {id(part) for module in kept for part in module.modules()}
    found = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and id(module) not in idle
        and outputs in (None, module.out_features)
    ]
    if not found:
        raise ValueError(
            f"the model has no linear last layer with {outputs} outputs; a last-layer posterior "
            "needs one"
        )
    return found[-1]


NOT_LINEAR = (
    "the logits are not a linear map of the last layer's input (an adapter on the head, or a "
    "transformation after it, such as `final_logit_softcapping` or a scale?), which a last-layer "
    "posterior needs; take a posterior over the adapter, such as KronLoraLaplace"
)


def seen_by_head(
    head: nn.Module, model: nn.Module, batch: Any, ids: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what a model's head sees of each example, ``(batch, d)``, and the model's logits.

    What it sees has the dtype that the head computes in, which is that of what it returns: autocast
    casts behind the head's back.

    Args:
        head: A layer of the model.
        model: From a batch to logits ``(batch, outputs)``.
        batch: What the model takes.
        ids: Outputs of the head that the logits are, where it may have others.

    Raises:
        RuntimeError: If the head did not run once per example, or the logits are not what it
            returned: a cap that bends them little is within the rounding of half precision.
    """
    seen: list[tuple[Tensor, Tensor]] = []
    with own_hooks() as hooks:
        hooks.on_output(head, lambda args, kwargs, out: seen.append((args[0], out.clone())))
        logits = model(batch)
    if len(seen) != 1 or seen[0][0].numel() != len(logits) * seen[0][0].shape[-1]:
        raise RuntimeError(
            "the last linear layer did not run once per example: "
            f"{[tuple(x.shape) for x, _ in seen]} for logits {tuple(logits.shape)}; take a "
            "posterior over the adapter, such as KronLoraLaplace"
        )
    features, returned = (t.reshape(len(logits), -1) for t in seen[0])
    if ids is not None and returned.shape != logits.shape:
        returned = returned[:, ids.to(returned.device)]
    is_comparable = returned.shape == logits.shape and not bool(logits.isnan().any())
    if is_comparable and not are_same(logits, returned):
        raise RuntimeError(NOT_LINEAR)
    return features.to(returned.dtype), logits


def are_same(now: Tensor, then: Tensor) -> bool:
    """Return whether a tensor has the values of another, but for casts and back."""
    then = then.to(now.device)
    casts = dict.fromkeys((now.dtype, torch.float32, torch.bfloat16, torch.float16))
    return any(torch.equal(now, then.to(cast).to(now.dtype)) for cast in casts)
