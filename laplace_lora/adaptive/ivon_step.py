"""The step of IVON's Algorithm 1, for one parameter."""

from __future__ import annotations

from typing import Any

from torch import nn

from laplace_lora.adaptive.weight_posterior import CollectedGradients
from laplace_lora.data.sharding import write_values


def move(
    group: dict[str, Any],
    p: nn.Parameter,
    state: dict[str, Any],
    collected: CollectedGradients,
    draws: int,
    hess_approx: str,
) -> None:
    """Move momentum, curvature and mean, in place; called without gradients.

    Args:
        group: The parameter's group.
        p: The parameter.
        state: Its state, see `WeightPosterior.weight_state`.
        collected: What was collected since the last step.
        draws: At how many draws.
        hess_approx: Estimate of the curvature, see `IVON`.
    """
    decay = group["weight_decay"]
    beta1, beta2 = group["betas"]
    h, g = state["hessian"], state["momentum"]
    estimate = collected.products * (group["ess"] / draws)
    if hess_approx == "price":
        estimate = estimate * (h + decay)
    state["step"] += 1
    g.mul_(beta1).add_(collected.gradients, alpha=(1 - beta1) / draws)
    correction = (h - estimate).square_().div_(h + decay)
    h.mul_(beta2).add_(estimate, alpha=1 - beta2).add_(correction, alpha=0.5 * (1 - beta2) ** 2)
    mean = state.get("mean", p)
    bias = 1 - beta1 ** state["step"] if group.get("debias", True) else 1.0
    step = (g / bias).add_(mean, alpha=decay).div_(h + decay)
    step.clamp_(-group["clip_radius"], group["clip_radius"])
    scale = group["hess_init"] + decay if group["rescale_lr"] else 1.0
    write_values(p, mean.sub_(step, alpha=group["lr"] * scale))
