"""`Rows`: the exact curvature of all weights together, as rows of a Jacobian."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.finite import all_finite
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.linalg.row_storage import RowStorage, free_space, packed_rows, unpack_rows
from laplace_lora.linalg.sketch import Factor
from laplace_lora.structures import sizes as memory
from laplace_lora.structures.base import Structure
from laplace_lora.structures.row_curvature import RowCurvature
from laplace_lora.structures.row_term import RowTerm
from laplace_lora.structures.sizes import GIB

Sums = TypeVar("Sums", bound=RowStorage | Factor)
Curvature = TypeVar("Curvature", bound=RowCurvature)

GRAM_COPIES = 5  # matrix, eigenvectors and workspace of the eigendecomposition, in float64


@dataclass(frozen=True)
class RowStructure(Structure[Sums, Sums, Curvature]):
    """What structures share whose posterior uses the curvature as rows.

    Attributes:
        sizes: Numbers in each tensor.
    """

    sizes: tuple[int, ...] = ()

    couples_groups = True
    sums_over_examples = True

    def tensors(self, sums: Sums) -> list[Tensor]:
        """Return the tensors that the sums consist of."""
        return sums.tensors()

    def finish(self, engine: Engine, sums: Sums, n: int) -> Sums:
        """Return the sums."""
        return sums

    def product(self, curvature: Curvature, rows: Tensor) -> Tensor:
        """Return the products of the curvature with weight vectors, ``(n, parameters)``."""
        return curvature.product(rows)

    def solve(self, curvature: Curvature, rows: Tensor, delta: float) -> Tensor:
        """Return ``(curvature + δ)⁻¹`` times weight vectors, ``(n, parameters)``."""
        return curvature.solve(rows, delta)

    def precision(self, curvature: Curvature, prior: Tensor, scale: Tensor) -> RowPrecision:
        """Return ``scale · curvature + prior``."""
        return curvature.precision(prior, scale)

    def log_det_ratio(self, curvature: Curvature, prior: Tensor, scale: Tensor) -> Tensor:
        """Return ``log det P − log det P₀``, a float64 scalar."""
        return curvature.log_det_ratio(prior, scale)


@dataclass(frozen=True)
class Rows(RowStructure[RowStorage, RowCurvature]):
    """The exact curvature as one row ``Sᵀ J`` per example and class contrast.

    Attributes:
        row_dtype: Dtype that the rows are kept in; the working dtype before it is bound if
            ``None``.
        storage: Where they are kept, see `RowStorage`.
    """

    row_dtype: torch.dtype | None = None
    storage: str | os.PathLike[str] = "device"

    advice = (
        "keep the rows elsewhere (`storage`), in half the size (row_dtype='bfloat16'), cover fewer "
        "`modules`, or use LowRankLoraLaplace"
    )
    adds_up = False

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the rows are kept in."""
        return torch.float32 if self.row_dtype is None else self.row_dtype

    def gradient_term(
        self, curvature: RowCurvature, gradient: Tensor, displacement: Tensor
    ) -> RowTerm | None:
        """Return the evidence's gradient term; ``None`` where the rows do not see the gradient."""
        values, vectors = curvature.eigenpairs(gradient.new_ones(1, dtype=torch.float64))
        term = RowTerm(curvature.rows, values, vectors, gradient, displacement)
        return term if term.is_exact else None

    def bound(self, engine: Engine) -> Rows:
        """Return the structure for a model's tensors.

        Raises:
            ValueError: If ``row_dtype`` is wider than the rows are.
        """
        dtype = engine.dtype if self.row_dtype is None else self.row_dtype
        if dtype.itemsize > engine.dtype.itemsize:
            name = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"row_dtype={name!r} is wider than the rows, {engine.dtype}; leave it "
                "out, or load the model in that dtype"
            )
        return replace(self, sizes=tuple(engine.sizes), row_dtype=dtype)

    def add(
        self,
        engine: Engine,
        sums: RowStorage | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, RowStorage]:
        """Add a batch's rows.

        Raises:
            MemoryError: If the rows of all examples will not fit; says what to do.
            FloatingPointError: If a row is not finite; names the tensor.
        """
        loss, blocks = engine.root_blocks(*batch, gradient)
        for i, block in enumerate(blocks):
            rows = checked_rows(engine, i, block)
            if sums is None:
                examples = len(batch[1])
                columns = len(rows) // examples
                self.check_room(engine.device, columns * (expected or examples))
                sums = self.empty(engine)
            sums.append(i, rows)
        assert sums is not None
        return loss, sums

    def empty(self, engine: Engine) -> RowStorage:
        """Return a storage without rows."""
        return RowStorage(self.sizes, self.dtype, engine.dtype, engine.device, self.storage)

    def merge(self, raw: RowStorage, n: int, other: RowStorage, m: int) -> RowStorage:
        """Return the rows of both.

        Raises:
            MemoryError: If they will not fit.
        """
        self.check_room(raw.device, len(raw) + len(other))
        return raw.joined(other)

    def ready(self, engine: Engine, raw: RowStorage) -> RowCurvature:
        """Return the rows with room for their Gram matrix's eigenpairs."""
        return RowCurvature(raw)

    def raw(self, curvature: RowCurvature) -> RowStorage:
        """Return the rows."""
        return curvature.rows

    def pack(self, curvature: RowCurvature, exact: bool = True) -> tuple[dict[str, Tensor], Any]:
        """Return the rows of each tensor by its number, and how many there are."""
        return packed_rows(curvature.rows, exact), len(curvature.rows)

    def unpack(
        self, engine: Engine, tensors: Mapping[str, Tensor], description: Any
    ) -> RowCurvature:
        """Return packed rows."""
        rows = self.empty(engine)
        unpack_rows(tensors, description, rows)
        return RowCurvature(rows)

    def unpack_device(self, device: torch.device) -> torch.device:
        """Return the posterior's device if rows are kept there, else the CPU."""
        return device if self.storage == "device" else torch.device("cpu")

    def to(self, curvature: RowCurvature, device: torch.device) -> RowCurvature:
        """Return the rows for work on another device."""
        return RowCurvature(curvature.rows.to(device))

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the bytes that rows, and the work with their Gram matrix, take of the device.

        Raises:
            ValueError: If the number of examples is not known.
        """
        if not examples:
            raise ValueError("the rows grow with the data; say how many: n_examples=...")
        return sum(self._need(engine.device, examples * columns))

    def arguments(self) -> dict[str, Any]:
        """Return the rows' dtype; where they are kept is not part of a posterior."""
        return {"row_dtype": str(self.dtype).removeprefix("torch.")}

    def _need(self, device: torch.device, rows: int) -> tuple[int, int]:
        stored = rows * sum(self.sizes) * self.dtype.itemsize
        on_device = self.storage == "device" or (self.storage == "cpu" and device.type == "cpu")
        return stored if on_device else 0, GRAM_COPIES * 8 * rows**2

    def check_room(self, device: torch.device, rows: int) -> None:
        """Refuse rows that will not fit, before the work.

        Raises:
            MemoryError: With advice.
        """
        on_device, gram = self._need(device, rows)
        stored = rows * sum(self.sizes) * self.dtype.itemsize
        places = [(on_device + gram, memory.available(device), str(device))]
        if self.storage == "cpu" and not on_device:
            places.append((stored, memory.available(torch.device("cpu")), "memory"))
        disk = free_space(self.storage)
        if disk is not None:
            places.append((stored, disk, f"the disk of storage={os.fspath(self.storage)!r}"))
        for need, free, where in places:
            if need > free:
                raise MemoryError(
                    f"{rows} rows of {sum(self.sizes)} numbers and their Gram matrix need "
                    f"{need / GIB:.2f} GiB of {where}, {free / GIB:.2f} GiB are free: {self.advice}"
                )


def checked_rows(engine: Engine, i: int, block: Tensor) -> Tensor:
    """Return a batch's rows of one tensor, ``(rows, numbers)``.

    Raises:
        FloatingPointError: If they are not finite; names the tensor.
    """
    if not all_finite(block):
        raise FloatingPointError(f"the curvature of {engine.names[i]!r} is not finite")
    return block.flatten(2).flatten(0, 1)
