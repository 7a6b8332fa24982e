"""Powers of two that keep a backward pass within float16, as loss scaling does in training.

Outputs of a small scale, as of regressions whose targets are small, have gradients below 2⁻²⁴,
which float16 rounds to zero, or coarsely below 2⁻¹⁴. Those of a large scale exceed its largest
number. Gradients are linear in what is sent backward, and a power of two changes no digit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOP = 8  # exponent of the largest gradient; float16 ends at 16, and batches differ
HIGHEST = 14  # exponent of what is sent backward
LOW = -13  # exponent of a layer's largest gradient, of which a step of 2⁻²⁴ is then 2⁻¹¹
TRIES = 8


def is_out_of_range(sizes: Sequence[float]) -> bool:
    """Return whether float16 holds gradients badly.

    Args:
        sizes: The largest gradient of each layer; zeros say nothing if there are others, as those
            of ``lora_A`` where ``lora_B`` is zero.
    """
    nonzero = [size for size in sizes if size]
    if not nonzero or not all(map(math.isfinite, sizes)):
        return True
    return min(nonzero) < 2.0**LOW or max(nonzero) > 2.0**TOP


def measured_gain(sizes: Callable[[float], Sequence[float]]) -> float | None:
    """Return the largest gradient for each unit sent backward; ``None`` if float16 holds them all.

    Args:
        sizes: Sends a column backward whose largest number is the given one, and returns the
            largest gradient of each layer; infinity, or NaN, where one is not finite.
    """
    found, sent = sizes(1.0), 1.0
    if not is_out_of_range(found):
        return None
    for _ in range(TRIES):
        is_finite = all(map(math.isfinite, found))
        size = max(found, default=0.0) if is_finite else math.inf
        if 2.0**LOW < size < math.inf or (is_finite and sent == 2.0**HIGHEST):
            break
        sent = min(sent * 2.0**TOP, 2.0**HIGHEST) if is_finite else sent * 2.0**-TOP
        found = sizes(sent)
    return size / sent


def gradient_scale(columns: Tensor, gain: float) -> float:
    """Return the power of two that brings the largest gradient to the top of float16.

    Args:
        columns: Gradients with respect to the outputs, of any shape.
        gain: From `measured_gain`.
    """
    size = largest(columns)
    if not size or not math.isfinite(size):
        return 1.0
    exponent = HIGHEST - math.frexp(size)[1]
    if size * gain:
        exponent = min(exponent, TOP - math.frexp(size * gain)[1])
    return 2.0**exponent


def largest(values: Tensor) -> float:
    """Return the largest absolute value, NaN where one is not a number; 0 where there is none."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values.detach())
    return float(torch.maximum(-low, high))


def widened(values: Tensor, scale: float) -> Tensor:
    """Return gradients divided by their scale, in float32 or better."""
    return values.to(torch.promote_types(values.dtype, torch.float32)) / scale
