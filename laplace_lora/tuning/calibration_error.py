"""The expected calibration error of class probabilities."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.functional.classification import multiclass_calibration_error

BINS = 15  # of confidence, equally wide


def expected_calibration_error(p: Tensor, y: Tensor) -> float:
    """Return the expected calibration error over 15 equal-width bins of confidence, a fraction.

    Source: Guo et al. (2017), arXiv:1706.04599, equation 3.

    Args:
        p: Class probabilities, ``(examples, classes)``.
        y: Labels, ``(examples,)``.
    """
    return float(multiclass_calibration_error(p, y, p.shape[-1], n_bins=BINS, norm="l1"))
