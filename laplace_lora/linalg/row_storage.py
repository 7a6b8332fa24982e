"""`RowStorage`: rows of a Jacobian, tensor by tensor, on a device, in memory or in mapped files.

Only where rows lie and how they are read again. What they mean belongs to `row_precision`, how many
there may be to `data_space`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

STORAGES = ("device", "cpu", "disk")
PIECE = 2**26  # numbers that are brought to the device at a time


class RowStorage:
    """Rows ``(rows, parameters)`` as one matrix for each trainable tensor.

    Args:
        sizes: Numbers of each trainable tensor.
        dtype: Number format that the rows are kept in.
        working_dtype: Number format that they are read in.
        device: Where they are computed with.
        storage: ``"device"``, ``"cpu"``, ``"disk"`` (files in the system's temporary folder), or a
            folder for the files. Files are mapped into memory, and deleted with the object.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        dtype: torch.dtype,
        working_dtype: torch.dtype,
        device: torch.device,
        storage: str | os.PathLike[str] = "device",
    ) -> None:
        self.sizes = list(sizes)
        self.dtype = dtype
        self.working_dtype = working_dtype
        self.device = torch.device(device)
        self.storage = storage
        self._parts: list[list[Tensor]] = [[] for _ in self.sizes]
        self._counts = [0] * len(self.sizes)
        self._folder = None if storage in ("device", "cpu") else _Folder(storage)

    def __len__(self) -> int:
        return self._counts[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return len(self) * sum(self.sizes) * self.dtype.itemsize

    def like(self) -> RowStorage:
        """Return an empty storage of the same kind."""
        return RowStorage(self.sizes, self.dtype, self.working_dtype, self.device, self.storage)

    def append(self, i: int, rows: Tensor) -> None:
        """Add rows of one tensor, ``(rows, numbers)``; every tensor gets equally many.

        Raises:
            ValueError: If the rows have another length.
        """
        if rows.ndim != 2 or rows.shape[1] != self.sizes[i]:
            raise ValueError(f"tensor {i} has {self.sizes[i]} numbers, not {tuple(rows.shape)}")
        rows = rows.detach().to(self.dtype).contiguous()
        self._counts[i] += len(rows)
        if self._folder is None:
            self._parts[i].append(rows if self.storage == "device" else rows.cpu())
            return
        self._parts[i].clear()  # mapped again when it is read
        with open(self._folder.path / str(i), "ab") as file:
            rows.cpu().view(torch.uint8).numpy().tofile(file)

    def matrix(self, i: int) -> Tensor:
        """Return all rows of one tensor as they are kept, ``(rows, numbers)``."""
        if self._folder is None:
            if len(self._parts[i]) != 1:
                self._parts[i] = [torch.cat(self._parts[i])]
        elif not self._parts[i]:
            path, numbers = str(self._folder.path / str(i)), self._counts[i] * self.sizes[i]
            mapped = torch.from_file(path, shared=False, size=numbers, dtype=self.dtype)
            self._parts[i] = [mapped.view(self._counts[i], self.sizes[i])]
        return self._parts[i][0]

    def tensors(self) -> list[Tensor]:
        """Return `matrix` of every tensor."""
        return [self.matrix(i) for i in range(len(self.sizes))]

    def pieces(self, i: int, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns of one tensor's rows, ready for products on the device.

        Args:
            i: The tensor.
            dtype: Number format, the working one if ``None``.

        Yields:
            Which columns, and ``(rows, columns)``.
        """
        matrix, dtype = self.matrix(i), dtype or self.working_dtype
        ready = matrix.device == self.device and matrix.dtype == dtype
        step = matrix.shape[1] if ready else max(1, PIECE // max(1, len(matrix)))
        for start in range(0, matrix.shape[1], step):
            columns = slice(start, start + step)
            yield columns, matrix[:, columns].to(self.device, dtype)

    def replace(self, matrices: Sequence[Tensor]) -> None:
        """Put other rows in the place of those there are.

        Raises:
            ValueError: If their shapes do not fit.
        """
        fresh = self.like()
        for i, matrix in enumerate(matrices):
            fresh.append(i, matrix)
        if len(matrices) != len(self.sizes) or len(set(fresh._counts)) > 1:
            raise ValueError("every tensor needs equally many rows")
        self.take(fresh)

    def joined(self, other: RowStorage) -> RowStorage:
        """Return these rows and another storage's, stored as these."""
        result = self.like()
        for i in range(len(self.sizes)):
            for rows in (self.matrix(i), other.matrix(i)):
                result.append(i, rows.to(self.device) if self.storage == "device" else rows)
        return result

    def to(self, device: torch.device | str) -> RowStorage:
        """Return the rows for work on another device."""
        result = RowStorage(
            self.sizes, self.dtype, self.working_dtype, torch.device(device), self.storage
        )
        for i in range(len(self.sizes)):
            moved = self.matrix(i)
            result.append(i, moved.to(device) if self.storage == "device" else moved)
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> RowStorage:
        """Copy the rows, mapped files included."""
        return self.to(self.device)

    def take(self, other: RowStorage) -> None:
        """Put another storage's rows in the place of these."""
        self._parts, self._counts, self._folder = other._parts, other._counts, other._folder


class _Folder:
    """A folder of its own that goes with the object."""

    def __init__(self, storage: str | os.PathLike[str]) -> None:
        root = None if storage == "disk" else Path(storage)
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="laplace_rows_", dir=root))
        weakref.finalize(self, shutil.rmtree, self.path, True)


def free_space(storage: str | os.PathLike[str]) -> int | None:
    """Return the free bytes of a storage's disk; ``None`` if it is none."""
    if storage in ("device", "cpu"):
        return None
    folder = Path(tempfile.gettempdir() if storage == "disk" else storage).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
