"""The expected calibration error of probabilities."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

BINS = 15  # of confidence, equally wide
ROUNDING = 1e-2  # how far beyond 0 and 1 rounding may take a probability, of bfloat16 say
LARGEST = 1 - 2.0**-24  # torchmetrics bins in float32, and gives 1 itself a sixteenth bin


def expected_calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the expected calibration error over 15 equal-width bins of confidence, a fraction.

    Source: Guo et al. (2017), arXiv:1706.04599, equation 3.

    Args:
        p: Class probabilities, ``(examples, classes)``.
        y: Labels, ``(examples,)``.

    Raises:
        ValueError: If ``p`` are no probabilities.
    """
    # Of the event that the answer is right: torchmetrics' own for classes adds up confidences in
    # float32, which is off by 0.004 at a million rows.
    confidence, answer = _binned(p).max(-1)
    return float(binary_calibration_error(confidence, (answer == y).long(), n_bins=BINS, norm="l1"))


def binary_expected_calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the calibration error of the probability of an event, over 15 equal-width bins.

    Args:
        p: Probabilities of the event, ``(examples,)``.
        y: Whether it took place, ``(examples,)``.

    Raises:
        ValueError: If ``p`` are no probabilities.
    """
    return float(binary_calibration_error(_binned(p), y.long(), n_bins=BINS, norm="l1"))


def bin_edges() -> Tensor:
    """Return the edges of the bins; each but the last is the least of the bin above it.

    Torchmetrics' own, of which one differs from its fraction in the last digit.
    """
    return torch.linspace(0, 1, BINS + 1, dtype=torch.float64)


def bin_of(confidence: Tensor) -> Tensor:
    """Return in which of the bins each confidence is counted, ``(examples,)``."""
    confidence = confidence.double().clamp(0, LARGEST)
    return torch.bucketize(confidence, bin_edges().to(confidence.device), right=True) - 1


def are_fractions(p: Tensor) -> bool:
    """Return whether all numbers lie in [0, 1], but for rounding."""
    return bool(((p >= -ROUNDING) & (p <= 1 + ROUNDING)).all())  # NaN compares as false


def _binned(p: Tensor) -> Tensor:
    """Return probabilities that torchmetrics takes for what they are.

    A single number outside [0, 1] makes it take all of them for logits.
    """
    if not are_fractions(p):
        raise ValueError(
            f"probabilities must lie in [0, 1], got {p.min():.4g} to {p.max():.4g}; apply a "
            "softmax or sigmoid to logits"
        )
    return p.double().clamp(0, LARGEST)
