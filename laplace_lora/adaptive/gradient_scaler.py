"""Gradients under a ``torch.amp.GradScaler``: take its factor out of what was collected."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.adaptive.weight_posterior import WeightPosterior


@torch.no_grad()
def overflows(posterior: WeightPosterior) -> bool:
    """Take the factor of the scaler in whose step this is out of the sums.

    And out of the parameters' gradients, which scores may read after the step.

    Args:
        posterior: The optimiser, which the scaler has told its factor and what it found.

    Returns:
        Whether they were not finite, and are gone.

    Raises:
        RuntimeError: If ``unscale_`` took the factor out of gradients that were collected before.
    """
    found = getattr(posterior, "found_inf", None)
    scale = getattr(posterior, "grad_scale", None)
    if found is None:
        return False
    finite = not bool(found)
    for p, sums in posterior.collected.items():
        if scale is not None:
            factor = 1 / scale.to(sums.gradients)
            sums.gradients = sums.gradients * factor
            squared = posterior.hess_approx == "gradsq"
            sums.products = sums.products * (factor.square() if squared else factor)
            if p.grad is not None:
                p.grad.mul_(1 / scale.to(p.grad))
        elif p.grad is not None and not _same(sums.gradients, p.grad):
            raise RuntimeError(
                "GradScaler.unscale_ was called after gradients were collected; call it inside "
                "`with optimizer.sampled_params(train=True):`, once a step, or not at all: "
                "GradScaler.step unscales"
            )
        finite = finite and bool(sums.gradients.isfinite().all())
    if not finite:
        posterior.forget()
    return not finite


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b.to(a.dtype), equal_nan=True)
