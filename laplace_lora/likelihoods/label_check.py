"""Refuse labels that a model cannot have, losses that are none, and probabilities as logits."""

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
    check_loss(loss, y, "the loss of a batch")


def check_loss(loss: Tensor, y: Tensor, what: str = "the loss") -> None:
    """Refuse a loss that is not finite, and say where that comes from.

    Args:
        loss: Summed over a batch.
        y: The batch's labels.
        what: What the error calls the loss.

    Raises:
        FloatingPointError: If it is not finite; names the rows whose labels are to blame.
    """
    if bool(loss.isfinite()):
        return
    rows = (~y.isfinite()).flatten(1).any(1) if y.ndim > 1 else ~y.isfinite()
    bad = rows.nonzero().flatten().tolist()
    if bad:
        listed = str(bad[:5]) if len(bad) <= 5 else f"{str(bad[:5])[:-1]}, ...]"
        raise FloatingPointError(
            f"{what} is {loss.item()}: labels are NaN or infinite at rows {listed} of the batch; "
            "correct these labels, or remove the examples"
        )
    raise FloatingPointError(
        f"{what} is {loss.item()}, and its labels are finite; look for NaN or infinity in the "
        "batch's inputs or padding and in the model's weights and outputs (float16 overflows where "
        "bfloat16 and float32 do not; float64 has NaN at padding longer than a sliding window)"
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
