"""Let LoRA on the stacked weights of experts run as layers, so that inputs and gradients show.

PEFT's ``target_parameters`` adds ``B_e A_e`` to the weight of every expert ``e`` and never runs
``A`` or ``B``. Here a projection of a token by an expert is computed as ever, but with its weight
held fixed, and ``B_e A_e x`` is added and taken away again: the value is the same, and the gradient
passes through ``A`` and ``B`` as layers. Both hold all experts, so a row of either has entries for
its own expert alone. The Kronecker factor of that side is block diagonal, a block for each expert
from the tokens routed to it; the factor of the other side is shared by the experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.models.changes.holders import Holders
from laplace_lora.models.tolerances import near

WRAPPERS = "_laplace_lora_wrappers"  # where experts keep PEFT's layers meanwhile
_COMPARED: WeakSet[nn.Module] = WeakSet()  # experts whose values have been found the same
NEEDED = ("_apply_gate", "has_bias", "has_gate", "is_transposed", "num_experts")


@contextmanager
def experts_as_layers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run adapted experts so that their adapters run as layers, temporarily.

    Experts of other classes than those that transformers can run in several ways are left alone.
    """
    found = adapted_experts(modules)
    for experts, by_name in found.items():
        vars(experts)[WRAPPERS] = by_name
    with _AS_LAYERS.hold(list(found), lambda experts: not _is_changed(experts)):
        yield


def adapted_experts(modules: Iterable[nn.Module]) -> dict[nn.Module, dict[str, Any]]:
    """Return the experts that an adapter changes, with PEFT's layer around each of their weights.

    Those whose projections cannot be told apart from outside are left out.
    """
    found: dict[nn.Module, dict[str, Any]] = {}
    for layer in modules:
        if isinstance(layer, LoraLayer) and hasattr(layer, "parameter_name"):
            experts: Any = layer.get_base_layer()
            wrapped: Any = layer
            found.setdefault(experts, {})[wrapped.parameter_name] = wrapped
    return {experts: by_name for experts, by_name in found.items() if _is_known(experts, by_name)}


def _is_known(experts: Any, by_name: dict[str, Any]) -> bool:
    if not all(hasattr(experts, name) for name in NEEDED):
        return False
    projections = {"gate_up_proj" if experts.has_gate else "up_proj", "down_proj"}
    one_each = all(
        wrapped.num_experts == experts.num_experts > 1
        and len([name for name in wrapped.active_adapters if name in wrapped.lora_A]) == 1
        for wrapped in by_name.values()
    )
    return (
        by_name.keys() <= projections
        and one_each
        and not getattr(experts, "_is_expert_parallel", False)
    )


def _change(experts: Any) -> None:
    original = experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        ours = _forward(experts, hidden_states, top_k_index, top_k_weights)
        if experts not in _COMPARED:
            with torch.no_grad():
                own = original(hidden_states, top_k_index, top_k_weights)
            if not near(ours.detach(), own, ours.dtype):
                raise RuntimeError(
                    f"{type(experts).__name__} computes something else than its projections say; "
                    "freeze the adapter's weights of its parameters (target_parameters)"
                )
            _COMPARED.add(experts)
        return ours

    experts.forward = forward


def _is_changed(experts: Any) -> bool:
    return getattr(vars(experts).get("forward"), "__module__", None) == __name__


def _undo(experts: Any) -> None:
    if _is_changed(experts):
        del experts.forward
    vars(experts).pop(WRAPPERS, None)


_AS_LAYERS = Holders[nn.Module](_change, _undo)


def _forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Return the sum over a token's experts of what they make of it, times their weights.

    Args:
        experts: A module of transformers with stacked weights.
        hidden_states: ``(tokens, d)``.
        top_k_index: Experts of each token, ``(tokens, k)``.
        top_k_weights: The same shape.
    """
    x = hidden_states.unsqueeze(1).expand(-1, top_k_index.shape[1], -1)
    if experts.has_gate:
        inner = experts._apply_gate(_projected(experts, "gate_up_proj", x, top_k_index))
    else:
        inner = experts.act_fn(_projected(experts, "up_proj", x, top_k_index))
    out = _projected(experts, "down_proj", inner, top_k_index)
    if getattr(experts, "has_post_expert_norm", False):
        out = experts.post_expert_norm(out)
    return (out * top_k_weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _projected(experts: Any, name: str, x: Tensor, index: Tensor) -> Tensor:
    """Return each row's projection by its expert, ``(tokens, k, p)``.

    Args:
        experts: The module.
        name: Of the stacked weights.
        x: ``(tokens, k, q)``.
        index: Experts, ``(tokens, k)``.
    """
    wrapped = vars(experts)[WRAPPERS].get(name)
    weights = getattr(experts, name)
    weights = weights if wrapped is None else weights.detach()
    biases = getattr(experts, f"{name}_bias") if experts.has_bias else None
    flat, chosen = x.flatten(0, 1), index.flatten()
    order, parts = [], []
    for e in chosen.unique().tolist():
        rows = (chosen == e).nonzero().squeeze(1)
        weight = weights[e].T if experts.is_transposed else weights[e]
        parts.append(F.linear(flat[rows], weight, None if biases is None else biases[e]))
        order.append(rows)
    out = torch.cat(parts)[torch.cat(order).argsort()].unflatten(0, index.shape)
    if wrapped is None:
        return out
    change = _change_of(wrapped, x.detach(), index)
    return out + (change - change.detach()).to(out.dtype)


def _change_of(wrapped: Any, x: Tensor, index: Tensor) -> Tensor:
    """Return ``B_e A_e x`` for each row's expert, by the adapter's two layers."""
    (adapter,) = [name for name in wrapped.active_adapters if name in wrapped.lora_A]
    down, up = wrapped.lora_A[adapter], wrapped.lora_B[adapter]
    inner = down(x.to(down.weight.dtype)).unflatten(-1, (wrapped.num_experts, -1))
    own = F.one_hot(index, wrapped.num_experts).to(inner.dtype)
    # PEFT counts experts first in A's outputs, and last in B's inputs.
    inner = (inner * own.unsqueeze(-1)).transpose(-1, -2).flatten(-2)
    change: Tensor = up(inner) * wrapped.scaling[adapter]
    return change
