"""Jacobians through which gradients flow, at the price of `torch.func.jacrev`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from laplace_lora.likelihoods.links import check_finite
from laplace_lora.models.changes.twins import resampled
from laplace_lora.models.inputs.rotary import angles_of, own_angles


@torch.enable_grad()
def differentiable_jacobians(model: nn.Module, x: Any) -> tuple[Tensor, Tensor]:
    """Return a model's outputs and their Jacobians as differentiable functions of its weights.

    Returns:
        Outputs ``(batch, outputs)`` and Jacobians ``(batch, outputs, parameters)``.

    Raises:
        FloatingPointError: If the outputs are not finite; names the rows.
    """
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    buffers, angles = dict(model.named_buffers()), angles_of(model)

    def outputs(weights: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        f = torch.func.functional_call(twin, (weights, {**buffers, **own_angles(angles)}), (x,))
        return f, f

    # On a twin, as a functional call replaces the tensors of its modules.
    # Fused attention has no derivative of its derivative.
    with resampled(model, []) as (twin, _), sdpa_kernel(SDPBackend.MATH):
        jacobians, f = torch.func.jacrev(outputs, has_aux=True)(weights)
    check_finite(f)
    parts = [jacobians[k].flatten(start_dim=-p.ndim) for k, p in weights.items()]
    return f, torch.cat(parts, dim=-1)
