"""How far two ways to compute the same outputs may differ by rounding."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative errors, of outputs a little larger than these numbers: dtype -> (error, outputs).
BOUNDS = {torch.float64: (1e-4, 0.1), torch.float32: (1e-3, 0.01)}
ROUNDED = (1e-2, 0.1)  # single precision whose products are rounded, as accelerators may do
COARSE = (0.05, 1.0)


def bound(dtype: torch.dtype, outputs: Tensor) -> float:
    """Return by how much outputs may differ that a model computes in a dtype."""
    relative, smallest = BOUNDS.get(dtype, COARSE)
    exact = outputs.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
    if dtype == torch.float32 and not exact:
        relative, smallest = ROUNDED
    return relative * (smallest + float(outputs.abs().max()))


def near(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> bool:
    """Return whether outputs have the same shape and values, but for rounding."""
    if ours.shape != theirs.shape:
        return False
    if not ours.numel():
        return True
    return not float((ours.to(theirs) - theirs).abs().max()) > bound(dtype, theirs)


def distance(ours: Tensor, theirs: Tensor) -> str:
    """Return how far outputs are apart, relative to the largest, in words."""
    if ours.shape != theirs.shape:
        return f"shape {tuple(ours.shape)} for {tuple(theirs.shape)}"
    error = float((ours.to(theirs) - theirs).abs().max() / theirs.abs().max())
    return f"{error:.1e} of the largest"
