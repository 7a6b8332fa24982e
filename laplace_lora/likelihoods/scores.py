"""Scores of class probabilities: entropy and expected calibration error."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15  # of confidence, equally wide


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of each distribution in nats.

    Args:
        p: Probabilities, ``(…, classes)``; the sum is taken in their dtype.

    Returns:
        Shape ``(…)``.
    """
    terms: Tensor = torch.special.entr(p)
    return terms.sum(-1)


def expected_calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the expected calibration error over 15 equal-width bins of confidence, a fraction.

    Source: Guo et al. (2017), arXiv:1706.04599, equation 3.

    Args:
        p: Class probabilities, ``(examples, classes)``.
        y: Labels, ``(examples,)``.
    """
    return float(multiclass_calibration_error(p, y, p.shape[-1], n_bins=BINS, norm="l1"))
