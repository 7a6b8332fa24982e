"""`SpectrumNodes`: few eigenvalues that stand for a spectrum under every prior precision.

As a function of ``log e``, ``1 / (e + δ)`` is smooth for every ``δ``, so its value at any ``e`` is
that of the polynomial through eight points nearby: with points 0.4 apart, to 4 parts in a million.
A sum ``Σ_k M_k / (e_k + δ)`` with positive semi-definite ``M_k`` is as exact, whatever they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

STEP = 0.4  # nats between nodes
POINTS = torch.arange(-3, 5)  # of the polynomial, around a cell from 0 to 1
DECADES = 12  # below the largest eigenvalue


@dataclass(frozen=True)
class SpectrumNodes:
    """Zero, and a geometric sequence over the range of a spectrum.

    Attributes:
        first: The smallest eigenvalue that is interpolated between nodes on both sides. Smaller
            ones are shared out between it and zero.
        cells: Steps from there to the largest.
    """

    first: float
    cells: int

    @classmethod
    def covering(cls, spectrum: Iterable[Tensor]) -> SpectrumNodes:
        """Return nodes for non-negative eigenvalues, at most 12 decades of them."""
        positive = [e[e > 0] for e in spectrum]
        ends = [(float(e.min()), float(e.max())) for e in positive if e.numel()]
        if not ends:
            return cls(1.0, 0)
        top = max(high for _, high in ends)
        first = max(min(low for low, _ in ends), top * 10.0**-DECADES)
        return cls(first, max(math.ceil(math.log(top / first) / STEP), 1))

    @property
    def values(self) -> Tensor:
        """The nodes, ``(nodes,)``, float64."""
        if not self.cells:
            return torch.zeros(1, dtype=torch.float64)
        steps = torch.arange(self.cells + len(POINTS) - 1, dtype=torch.float64) + POINTS[0]
        return torch.cat([torch.zeros(1).double(), self.first * (STEP * steps).exp()])

    def shares(self, e: Tensor) -> Tensor:
        """Return what each node gets of each eigenvalue, ``(K, nodes)``; a row's sum is 1.

        Args:
            e: Eigenvalues of the spectrum, ``(K,)``.
        """
        if not self.cells:
            return torch.ones_like(e).unsqueeze(1)
        place = (e.clamp(min=self.first) / self.first).log() / STEP
        cell = place.floor().clamp(max=self.cells - 1)
        weights = torch.vander(place - cell, len(POINTS), increasing=True) @ _basis().to(e)
        inside = (e / self.first).clamp(max=1).unsqueeze(1)
        columns = cell.long().unsqueeze(1) + torch.arange(1, 1 + len(POINTS), device=e.device)
        shares = e.new_zeros(len(e), self.cells + len(POINTS))
        shares[:, :1] = 1 - inside
        return shares.scatter_(1, columns, weights * inside)


@cache
def _basis() -> Tensor:
    """Return the coefficients of the points' Lagrange polynomials, ``(powers, points)``."""
    inverse: Tensor = torch.linalg.inv(torch.vander(POINTS.double(), increasing=True))
    return inverse
