"""What `LaplaceCallback` checks before the first step of a training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from laplace_lora.data.batches import one_example
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.structures.posterior import Posterior


def check_makes_predictions(kind: Any) -> None:
    """Refuse a class whose objects cannot predict data sets or be saved.

    Args:
        kind: What makes the posterior. Of a function only a call can tell.

    Raises:
        TypeError: If it is one.
    """
    while isinstance(kind, partial):
        kind = kind.func
    if isinstance(kind, type) and not issubclass(kind, LoraLaplace):
        raise TypeError(
            f"a {kind.__name__} cannot be fitted by LaplaceCallback; take one of the "
            "posteriors with `predict` and `save_pretrained`, such as KronLoraLaplace"
        )


@torch.no_grad()
def try_out(posterior: Posterior, batch: Any) -> None:
    """Compute the loss of one example, of all where a batch cannot be taken apart."""
    posterior.split(batch)
    batch = posterior.by_example(batch)
    x, y = posterior.split(one_example(batch, 0) if posterior.divides(batch) else batch)
    with evaluation_mode(posterior.model):
        posterior.objective.nll(posterior.model(x), y)
