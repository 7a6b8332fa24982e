"""How many numbers a curvature holds, and how much memory is free."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from pathlib import Path

import torch

from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.sketch import sketch_columns

GIB, MIB = 2**30, 2**20


def kron_size(sides: list[list[int]], spec: FactorSpec) -> int:
    """Return the numbers that Kronecker factors and their eigenpairs hold.

    Args:
        sides: Lengths of each map's input and gradient side.
        spec: Which sides are low-rank.
    """
    total = 0
    for d in (d for pair in sides for d in pair):
        rank = spec.rank or 0
        total += 2 * d * d if spec.is_dense(d) else d * (sketch_columns(rank) + rank)
    return total


def table_size(blocks: list[list[int]], spec: FactorSpec, diagonal: list[list[bool | None]]) -> int:
    """Return the numbers that corrected eigenvalues hold.

    Args:
        blocks: Lengths of the sides of each tensor's block.
        spec: Which sides are low-rank.
        diagonal: Which of them are, or may be, diagonals.
    """
    return sum(
        math.prod(
            d if spec.is_dense(d) or kind is not False else (spec.rank or 0) + 1
            for d, kind in zip(sides, kinds, strict=True)
        )
        for sides, kinds in zip(blocks, diagonal, strict=True)
    )


def available(device: torch.device) -> int:
    """Return the free bytes of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with suppress(OSError, StopIteration):  # where the kernel says so: free, or freed on demand
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line for line in lines if "MemAvailable" in line).split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
