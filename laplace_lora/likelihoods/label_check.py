"""Refuse labels of other data as a fit does its own, and probabilities in place of logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.base import OUTPUTS, Likelihood, Readout


@torch.no_grad()
def check_labels(
    likelihood: Likelihood, values: Tensor, y: Tensor, readout: Readout = OUTPUTS
) -> None:
    """Refuse labels that a model's outputs cannot have, before any broadcasting hides them.

    Args:
        likelihood: Its loss says what is wrong with shapes, dtypes and ranges.
        values: The outputs, or functions of them, a row for each row of the outputs.
        y: Labels, see `Likelihood.split`.
        readout: Which functions.

    Raises:
        ValueError: If labels have another shape than the outputs ask for, or are none of the
            classes.
        FloatingPointError: If their loss is not finite.
    """
    if readout.label_first:
        y = torch.zeros_like(y)
    # A softmax does not see what contrasts leave out, so a first class at zero has the same loss.
    loss = likelihood.nll(F.pad(values, (1, 0)) if readout.relative else values, y)
    if not bool(loss.isfinite()):
        raise FloatingPointError(
            f"the loss of a batch is {loss.item()}; look for NaN or infinity in its labels or "
            "targets, and remove these examples"
        )


def check_logits(f: Tensor, source: str) -> None:
    """Refuse outputs that are probabilities already.

    Args:
        f: Outputs, ``(batch, classes)``.
        source: What returned them.

    Raises:
        ValueError: If no entry is negative and every row sums to one.
    """
    if len(f) and bool((f >= 0).all()) and bool(((f.double().sum(-1) - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"{source} returned probabilities (rows that sum to one, without negative entries); "
            "return the logits, before the softmax"
        )
