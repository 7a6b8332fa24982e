"""`FullLoraLaplace`: the exact GGN posterior over all adapter weights together.

This room turns data into rows, and knows how many will fit; what is done with rows belongs to
`gram_posterior`, its truncation to a few directions to `low_rank`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.fitting.passes import Pass
from laplace_lora.linalg.row_storage import STORAGES, RowStorage, free_space
from laplace_lora.structures import sizes as memory
from laplace_lora.structures.rows import GramPosterior
from laplace_lora.structures.sizes import GIB

ROW_DTYPES = ("bfloat16", "float32", "float64")
GRAM_COPIES = 5  # matrix, eigenvectors and workspace of the eigendecomposition, in float64


class RowPass(Pass):
    """A pass that collects rows, where others add up."""

    def signature(self, state: RowStorage) -> Any:
        """Return what must be equal in processes whose rows go together."""
        return [*state.sizes, str(state.dtype)]

    def combine(self, state: RowStorage) -> None:
        """Take in the other processes' rows."""
        state.gather()

    def resume(self, state: RowStorage, kept: Sequence[Tensor]) -> None:
        """Put the rows of an interrupted pass in the place of a first batch's."""
        state.replace(kept)


class FullLoraLaplace(GramPosterior):
    """Laplace posterior with the exact GGN of all adapter weights, correlations included.

    The GGN is ``Zᵀ Z`` with one row ``Sᵀ J`` an example and class contrast, so its spectrum is that
    of a matrix of rows × rows, and nothing parameters × parameters is ever formed. For ``N``
    examples of ``C`` classes and ``P`` weights it keeps ``N (C − 1) P`` numbers: for some thousand
    examples of a small model exactly what one wants, for more `LowRankLoraLaplace`.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"`` or ``"regression"``.
        storage: Where the rows are kept: ``"device"``, ``"cpu"``, ``"disk"`` (mapped files in the
            system's temporary folder) or a folder for mapped files, which are deleted with the
            posterior. It changes nothing but memory and time, and is not saved.
        row_dtype: Number format of the rows, ``"bfloat16"``, ``"float32"`` or ``"float64"``; the
            widest that makes sense when ``None``. Products are taken in float32 or better.
        **kwargs: Arguments of `LoraPosterior`.

    Raises:
        ValueError: If an argument is unknown, or ``row_dtype`` is wider than the rows are.
    """

    _key = ("lora", "full")
    _memory_advice = (
        "keep the rows elsewhere (`storage`), in half the size (row_dtype='bfloat16'), cover fewer "
        "`modules`, or use LowRankLoraLaplace"
    )
    _expected: int | None = None

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        storage: str | os.PathLike[str] = "device",
        row_dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, likelihood, **kwargs)
        if isinstance(storage, str) and storage not in STORAGES and os.sep not in storage:
            raise ValueError(
                f"storage must be one of {STORAGES} or a folder with a {os.sep!r}, got {storage!r}"
            )
        name = str(self._dtype if row_dtype is None else row_dtype).removeprefix("torch.")
        if name not in ROW_DTYPES:
            raise ValueError(f"row_dtype must be one of {ROW_DTYPES}, got {row_dtype!r}")
        if getattr(torch, name).itemsize > self._dtype.itemsize:
            raise ValueError(f"row_dtype={name!r} is wider than the rows, {self._dtype}")
        self.storage = storage
        self.row_dtype: torch.dtype = getattr(torch, name)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model, backend and storage."""
        return {**super().arguments(), "row_dtype": str(self.row_dtype).removeprefix("torch.")}

    def curvature_size(self) -> int:
        """Return how many numbers the rows and their Gram matrix with eigenvectors hold.

        Raises:
            AttributeError: If the posterior has not been fitted: it grows with the data.
        """
        return len(self.rows) * (self.n_params + 2 * len(self.rows))

    def _curvature_bytes(self, n_examples: int | None, outputs: int) -> int:
        n = n_examples or self.n_data
        if not n:
            raise ValueError("the rows grow with the data; say how many: n_examples=...")
        rows = n * (outputs - 1 if self.likelihood == "classification" else outputs)
        return sum(self._need(rows))

    def _need(self, rows: int) -> tuple[int, int]:
        """Return the bytes of the device that rows, and the work with their Gram matrix, take."""
        kept = rows * self.n_params * self.row_dtype.itemsize
        on_device = self.storage == "device" or (
            self.storage == "cpu" and self._device.type == "cpu"
        )
        return kept if on_device else 0, GRAM_COPIES * 8 * rows**2

    def _announce(self, loader: Any) -> None:
        try:
            self._expected = len(loader.dataset)
        except TypeError:  # a stream
            self._expected = None

    def _check_room(self, rows: int) -> None:
        """Refuse rows that will not fit, before the work.

        Raises:
            MemoryError: With advice.
        """
        on_device, gram = self._need(rows)
        kept = rows * self.n_params * self.row_dtype.itemsize
        places = [(on_device + gram, memory.available(self._device), str(self._device))]
        if self.storage == "cpu" and not on_device:
            places.append((kept, memory.available(torch.device("cpu")), "memory"))
        disk = free_space(self.storage)
        if disk is not None:
            places.append((kept, disk, f"the disk of storage={os.fspath(self.storage)!r}"))
        for need, free, where in places:
            if need > free:
                raise MemoryError(
                    f"{rows} rows of {self.n_params} numbers and their Gram matrix need "
                    f"{need / GIB:.2f} GiB of {where}, {free / GIB:.2f} GiB are free: "
                    f"{self._memory_advice}"
                )

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        loss, blocks = self.backend.root_blocks(x, y)
        for i, block in enumerate(blocks):
            rows = self._checked_rows(i, block)
            if state is None:
                columns = len(rows) // len(y)
                self._check_room(columns * (self._expected or len(y)))
                state = self._empty()
            state.append(i, rows)
        return loss, state

    def _empty(self) -> RowStorage:
        sizes = [parameter.numel() for parameter in self.params]
        return RowStorage(sizes, self.row_dtype, self._dtype, self._device, self.storage)

    def _tensors(self, state: RowStorage) -> list[Tensor]:
        return state.tensors()

    def _pass(self) -> RowPass:
        return RowPass(self._add, self._tensors)

    def _joined(self, curvature: RowStorage, n: int, other: RowStorage, m: int) -> RowStorage:
        self._check_room(len(curvature) + len(other))
        return curvature.joined(other)

    def _install(self, curvature: RowStorage) -> None:
        self.H, self._eigen = curvature, None

    @property
    def _unpack_device(self) -> torch.device:
        return self._device if self.storage == "device" else torch.device("cpu")

    def _packed(self) -> tuple[dict[str, Tensor], Any]:
        rows = self.rows
        return {str(i): rows.matrix(i) for i in range(len(rows.sizes))}, len(rows)

    def _unpacked(self, tensors: Mapping[str, Tensor], description: Any) -> RowStorage:
        rows = self._empty()
        if type(description) is not int or description < 1 or len(tensors) != len(rows.sizes):
            raise ValueError("the rows do not fit the model's tensors")
        for i, size in enumerate(rows.sizes):
            matrix = tensors[str(i)]
            if matrix.shape != (description, size) or matrix.dtype != self.row_dtype:
                raise ValueError(f"rows {i} are {matrix.dtype} of shape {tuple(matrix.shape)}")
            rows.append(i, matrix)
        return rows
