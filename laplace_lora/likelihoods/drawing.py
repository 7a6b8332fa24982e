"""Labels drawn from class probabilities, with few random numbers for a large vocabulary."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def drawn_labels(p: Tensor, count: int) -> Tensor:
    """Return labels drawn independently, with torch's global generator.

    ``torch.multinomial`` draws a random number for each class, which on a processor takes several
    times as long as the softmax. One for each label is enough: it chooses a block of classes by
    their cumulative probabilities, and what is left of it a class of the block.

    Args:
        p: Probabilities, ``(batch, classes)``; their sums need not be exactly one.
        count: Labels of each example.

    Returns:
        Shape ``(batch, count)``.
    """
    if p.device.type != "cpu":  # accelerators have numbers enough, and not all have float64
        return torch.multinomial(p, count, replacement=True)
    classes = p.shape[1]
    size = math.isqrt(classes - 1) + 1
    whole = classes - classes % size
    masses = torch.cat(
        [p[:, :whole].unflatten(1, (-1, size)).sum(-1), p[:, whole:].sum(-1, keepdim=True)], dim=1
    )
    block, left = _inverse(masses, torch.rand(len(p), count, dtype=torch.float64))
    columns = block.unsqueeze(-1) * size + torch.arange(size)
    rows = torch.arange(len(p)).view(-1, 1, 1)
    inner = p[rows, columns.clamp(max=classes - 1)] * (columns < classes)
    place, _ = _inverse(inner.flatten(0, 1), left.view(-1, 1))
    return block * size + place.view_as(block)


def _inverse(masses: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the inverse of cumulative distributions, never where there is no mass.

    Args:
        masses: Of each place, ``(n, places)``.
        uniform: Numbers in ``[0, 1)``, ``(n, k)``, float64.

    Returns:
        Places ``(n, k)``, and how far within its place each number lies, in ``[0, 1)`` likewise.
    """
    reached = masses.double().cumsum(-1)
    total = reached[:, -1:]
    at = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    place = torch.searchsorted(reached, at, right=True)
    mass = masses.double().gather(-1, place)
    within = (at - reached.gather(-1, place) + mass) / mass
    return place, within.clamp(0, 1 - torch.finfo(torch.float64).eps)
