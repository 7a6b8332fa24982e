"""`RowStorage`: rows of a Jacobian, tensor by tensor, on a device, in memory or in mapped files."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from laplace_lora.linalg.rounded import SCALE, rounded, widened

STORAGES = ("device", "cpu", "disk")
PIECE = 2**26  # number of entries brought to the device at a time


class RowStorage:
    """Rows ``(rows, parameters)`` as one matrix for each trainable tensor.

    Args:
        sizes: Number of entries of each trainable tensor.
        dtype: Dtype in which the rows are stored.
        working_dtype: Dtype in which they are read.
        device: Device of computations.
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
        return self._with(self.device)

    def append(self, i: int, rows: Tensor) -> None:
        """Add rows of one tensor, ``(rows, entries)``; every tensor needs equally many.

        Raises:
            ValueError: If the rows have the wrong length.
        """
        if rows.ndim != 2 or rows.shape[1] != self.sizes[i]:
            raise ValueError(
                f"rows of tensor {i} have {self.sizes[i]} entries, got shape {tuple(rows.shape)}"
            )
        rows = rows.detach().to(self.dtype).contiguous()
        self._counts[i] += len(rows)
        if self._folder is None:
            self._parts[i].append(rows if self.storage == "device" else rows.cpu())
            return
        self._parts[i].clear()  # the file is mapped again when it is read
        with open(self._folder.path / str(i), "ab") as file:
            rows.cpu().view(torch.uint8).numpy().tofile(file)

    def matrix(self, i: int) -> Tensor:
        """Return all rows of one tensor as stored, ``(rows, entries)``."""
        if self._folder is None:
            if len(self._parts[i]) != 1:
                self._parts[i] = [torch.cat(self._parts[i])]
        elif not self._parts[i]:
            path, size = str(self._folder.path / str(i)), self._counts[i] * self.sizes[i]
            mapped = torch.from_file(path, shared=False, size=size, dtype=self.dtype)
            self._parts[i] = [mapped.view(self._counts[i], self.sizes[i])]
        return self._parts[i][0]

    def tensors(self) -> list[Tensor]:
        """Return `matrix` of every tensor."""
        return [self.matrix(i) for i in range(len(self.sizes))]

    def pieces(self, i: int, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Yield columns of one tensor's rows, ready for products on the device.

        Args:
            i: The tensor.
            dtype: Dtype of the result; ``None`` for the working dtype.

        Yields:
            The columns, and their entries ``(rows, columns)``.
        """
        matrix, dtype = self.matrix(i), dtype or self.working_dtype
        ready = matrix.device == self.device and matrix.dtype == dtype
        step = matrix.shape[1] if ready else max(1, PIECE // max(1, len(matrix)))
        for start in range(0, matrix.shape[1], step):
            columns = slice(start, start + step)
            yield columns, matrix[:, columns].to(self.device, dtype)

    def project(self, W: Tensor) -> Tensor:
        """Return ``W Zᵀ`` with these rows ``Z``, ``(n, rows)``, for ``W`` ``(n, parameters)``."""
        total = W.new_zeros(len(W), len(self))
        for i, part in enumerate(W.split(self.sizes, dim=-1)):
            for columns, Z in self.pieces(i, W.dtype):
                total += part[:, columns] @ Z.T
        return total

    def lift(self, core: Tensor) -> Tensor:
        """Return ``core Z``, ``(n, parameters)``, for ``core`` of shape ``(n, rows)``."""
        tensors = range(len(self.sizes))
        return torch.cat([core @ Z for i in tensors for _, Z in self.pieces(i, core.dtype)], -1)

    def replace(self, matrices: Sequence[Tensor]) -> None:
        """Replace all rows by others.

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
        """Return these rows followed by another storage's, stored like these."""
        return self._with(self.device, self, other)

    def to(self, device: torch.device | str) -> RowStorage:
        """Return the rows for computations on another device."""
        return self._with(torch.device(device), self)

    def _with(self, device: torch.device, *parts: RowStorage) -> RowStorage:
        """Return the rows of all parts for computations on a device, stored like these."""
        result = RowStorage(self.sizes, self.dtype, self.working_dtype, device, self.storage)
        for i in range(len(self.sizes)):
            for rows in (part.matrix(i) for part in parts):
                result.append(i, rows.to(device) if self.storage == "device" else rows)
        return result

    def __deepcopy__(self, memo: dict[int, object]) -> RowStorage:
        """Copy the rows, mapped files included."""
        return self.to(self.device)

    def take(self, other: RowStorage) -> None:
        """Replace these rows by another storage's."""
        self._parts, self._counts, self._folder = other._parts, other._counts, other._folder


def packed_rows(rows: RowStorage, exact: bool) -> dict[str, Tensor]:
    """Return the rows of each tensor by its number.

    Args:
        rows: The rows.
        exact: Whether they are kept as they are stored, or `rounded`.
    """
    matrices = {str(i): rows.matrix(i) for i in range(len(rows.sizes))}
    if exact:
        return matrices
    return {
        k: part for name, matrix in matrices.items() for k, part in rounded(name, matrix).items()
    }


def unpack_rows(tensors: Mapping[str, Tensor], count: object, rows: RowStorage) -> None:
    """Append what `packed_rows` returned to an empty storage.

    Args:
        tensors: The packed rows.
        count: How many rows there are, read from a file and not validated yet.
        rows: The storage.

    Raises:
        ValueError: If the rows do not fit the storage.
        KeyError: If a tensor is missing.
    """
    names = [str(i) for i in range(len(rows.sizes))]
    scales = [f"{name}.{SCALE}" for name in names]
    if type(count) is not int or count < 1 or not set(tensors) <= {*names, *scales}:
        raise ValueError("the rows do not fit the model's tensors")
    for i, size in enumerate(rows.sizes):
        matrix = widened(tensors, names[i], rows.dtype)
        if matrix.shape != (count, size) or matrix.dtype != rows.dtype:
            raise ValueError(f"rows {i} are {matrix.dtype} of shape {tuple(matrix.shape)}")
        rows.append(i, matrix)


class _Folder:
    """A new folder that is deleted with the object."""

    def __init__(self, storage: str | os.PathLike[str]) -> None:
        root = None if storage == "disk" else Path(storage)
        if root is not None:
            root.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(prefix="laplace_rows_", dir=root))
        weakref.finalize(self, shutil.rmtree, self.path, True)


def free_space(storage: str | os.PathLike[str]) -> int | None:
    """Return the free bytes of a storage's disk; ``None`` if it is not on disk."""
    if storage in ("device", "cpu"):
        return None
    folder = Path(tempfile.gettempdir() if storage == "disk" else storage).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def by_tensor(values: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Split one value in all, one per tensor or one per weight into the tensors' parts.

    Raises:
        ValueError: If there are as many values as neither.
    """
    n = sum(sizes)
    if len(values) == 1:
        return [values[0]] * len(sizes)
    if len(values) == n:
        return list(values.split(list(sizes)))
    if len(values) != len(sizes):
        raise ValueError(f"{len(values)} values for {len(sizes)} tensors of {n} numbers")
    return list(values.unbind())


def by_weight(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Return one value per weight from the tensors' parts, each a scalar or its weights' values."""
    return torch.cat([part.expand(size) for part, size in zip(parts, sizes, strict=True)])
