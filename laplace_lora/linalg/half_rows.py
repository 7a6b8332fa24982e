"""Rows that bfloat16 holds exactly, and their products on tensor cores.

An adapter in float32 on a bfloat16 model sees numbers of bfloat16 that PEFT has cast. A product of
such rows with a matrix split into two terms of bfloat16 is as good as float32's own, and tensor
cores compute it many times faster.
"""

from __future__ import annotations

import torch
from torch import Tensor

BFLOAT16 = torch.bfloat16
ALIGNED = 8  # columns in 16 bytes; NVIDIA's guide asks for rows of whole 16 bytes on tensor cores


def split(matrix: Tensor) -> Tensor:
    """Return a float32 matrix as two terms of bfloat16, side by side.

    Args:
        matrix: Shape ``(n, c)``.

    Returns:
        Shape ``(n, 2 c)``: rounded, then what the rounding left; the sum is right to 2⁻¹⁷.
    """
    columns = matrix.shape[1]
    terms = matrix.new_empty(len(matrix), 2 * columns, dtype=BFLOAT16)
    terms[:, :columns].copy_(matrix)
    torch.sub(matrix, terms[:, :columns], out=terms[:, columns:])
    return terms


def product(rows: Tensor, terms: Tensor) -> Tensor:
    """Return ``rows @ matrix`` in float32.

    Args:
        rows: Of bfloat16, ``(n, d)``.
        terms: The matrix as `split` returns it, ``(d, 2 c)``.

    Returns:
        Shape ``(n, c)``.
    """
    if rows.is_cuda:
        both = torch.mm(rows, terms, out_dtype=torch.float32)
    else:
        both = rows.float() @ terms.float()
    columns = terms.shape[1] // 2
    return both[:, :columns] + both[:, columns:]


class HalfRows:
    """Finds out on a first batch which rows bfloat16 holds exactly, and narrows them afterwards.

    Args:
        devices: Types of devices whose rows are narrowed.
    """

    def __init__(self, devices: tuple[str, ...] = ("cuda",)) -> None:
        self.devices = devices
        self._exact: dict[int, bool] = {}
        self._asked: dict[int, list[Tensor]] = {}

    def narrowed(self, key: int, rows: Tensor) -> Tensor:
        """Return rows in bfloat16 if those of the first batch were exact in it.

        Args:
            key: Names where the rows come from.
            rows: Shape ``(n, d)``.
        """
        if rows.dtype != torch.float32 or rows.device.type not in self.devices:
            return rows
        if key in self._exact:
            return rows.to(BFLOAT16) if self._exact[key] else rows
        # Zeros alone, of a layer that the first batch does not move, show nothing.
        shown = (rows.to(BFLOAT16) == rows).all() & rows.any()
        self._asked.setdefault(key, []).append(shown)
        return rows

    def settle(self) -> None:
        """Take in what a batch has shown; all at once, as a device waits for each answer."""
        if not self._asked:
            return
        answers = [torch.stack(asked).all() for asked in self._asked.values()]
        device = answers[0].device
        found = torch.stack([answer.to(device) for answer in answers]).tolist()
        self._exact |= dict(zip(self._asked, found, strict=True))
        self._asked = {}
