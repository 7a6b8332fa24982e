"""`Sketched`: the leading directions of the curvature of all weights together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.loss_gradient import LossGradient
from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.finite import check_diagonal
from laplace_lora.linalg.row_storage import RowStorage, packed_rows, unpack_rows
from laplace_lora.linalg.sketch import Factor, LowRankFactor, sketch_columns
from laplace_lora.structures.row_curvature import RowCurvature
from laplace_lora.structures.rows import RowStructure, checked_rows


@dataclass(frozen=True)
class SketchedCurvature(RowCurvature):
    """The leading directions of the curvature as rows, and the sketch that they are from.

    Attributes:
        sketch: The sketch, to which further data may be added.
        truncation: Share of the curvature's trace that the directions miss.
    """

    sketch: Factor = field(kw_only=True)
    truncation: float = field(kw_only=True)


@dataclass(frozen=True)
class Sketched(RowStructure[Factor, SketchedCurvature]):
    """The leading directions of the curvature, from a sketch that grows with the weights alone.

    The sketch is summed in float64, whatever the model's dtype: a large noise precision or large
    features put directions that are far above the prior below the rounding of the first.

    Attributes:
        rank: Directions kept.
    """

    rank: int = 128

    advice = "lower `rank`, or cover fewer `modules`"

    def bound(self, engine: Engine) -> Sketched:
        """Return the structure for a model's tensors."""
        return replace(self, sizes=tuple(engine.sizes))

    def add(
        self,
        engine: Engine,
        sums: Factor | None,
        batch: tuple[Any, Tensor],
        gradient: LossGradient | None,
        expected: int | None,
    ) -> tuple[Tensor, Factor]:
        """Add a batch's rows to the sketch.

        Raises:
            FloatingPointError: If a row is not finite; names the tensor.
        """
        loss, blocks = engine.root_blocks(*batch, gradient)
        # A sketch needs a row's product with the test matrix first, over all tensors.
        rows: Tensor | None = None
        for i, block in enumerate(blocks):
            part = checked_rows(engine, i, block)
            if rows is None:
                rows = part.new_empty(len(part), sum(self.sizes))
            rows.split(self.sizes, dim=1)[i].copy_(part)
        assert rows is not None
        sums = self.empty(engine) if sums is None else sums
        sums.update(rows)
        return loss, sums

    def empty(self, engine: Engine) -> Factor:
        """Return an empty sketch."""
        spec, dtypes = FactorSpec(self.rank, 0), (torch.float64, engine.device, engine.dtype)
        return spec.empty(sum(self.sizes), *dtypes)

    def merge(self, raw: Any, n: int, other: Any, m: int) -> Factor:
        """Return the sum of two sketches."""
        total: Factor = raw.add(other)
        return total

    def ready(self, engine: Engine, raw: Factor) -> SketchedCurvature:
        """Return the sketch with its leading directions.

        Raises:
            FloatingPointError: If the sketch is not finite.
        """
        eigen = raw.decompose("zero")
        values, order = eigen.values.sort(descending=True)
        values, order = values[: self.rank], order[: self.rank]
        rows, roots = self._no_rows(engine), values.sqrt()
        for i, part in enumerate(eigen.vectors.split(self.sizes)):
            rows.append(i, (part[:, order] * roots.to(part)).T)
        return self._curvature(raw, rows, values)

    def _no_rows(self, engine: Engine) -> RowStorage:
        return RowStorage(self.sizes, engine.dtype, engine.dtype, engine.device)

    def _curvature(self, sketch: Factor, rows: RowStorage, values: Tensor) -> SketchedCurvature:
        trace, kept = float(sketch.trace), float(values.double().sum())
        truncation = max(0.0, 1 - kept / trace) if trace > 0 else 0.0
        return SketchedCurvature(rows, sketch=sketch, truncation=truncation)

    def raw(self, curvature: SketchedCurvature) -> Factor:
        """Return the sketch."""
        return curvature.sketch

    def pack(
        self, curvature: SketchedCurvature, exact: bool = True
    ) -> tuple[dict[str, Tensor], Any]:
        """Return the sketch's tensors by their numbers, and how many there are.

        If not exact, the directions take the sketch's place, with the trace.
        """
        sketch = curvature.sketch
        if exact or not isinstance(sketch, LowRankFactor):
            tensors = sketch.tensors()
            return {str(i): tensor for i, tensor in enumerate(tensors)}, len(tensors)
        return {**packed_rows(curvature.rows, exact), "trace": sketch.trace}, len(curvature.rows)

    def unpack(
        self, engine: Engine, tensors: Mapping[str, Tensor], description: Any
    ) -> SketchedCurvature:
        """Return a packed sketch with its directions."""
        if "trace" in tensors:
            return self._rebuilt(engine, dict(tensors), description)
        sketch = self.empty(engine)
        expected = sketch.tensors()
        if description != len(expected) or len(tensors) != len(expected):
            raise ValueError("the tensors are not those of a sketch")
        for i, tensor in enumerate(expected):
            packed = tensors[str(i)]
            if packed.shape != tensor.shape:
                raise ValueError(f"the sketch has a tensor of shape {tuple(packed.shape)}")
            tensor.copy_(packed)
        check_diagonal(expected[-1])
        return self.ready(engine, sketch)

    def _rebuilt(
        self, engine: Engine, tensors: dict[str, Tensor], count: object
    ) -> SketchedCurvature:
        """Return directions with the sketch that they stand for, which was packed without it."""
        trace, rows = tensors.pop("trace"), self._no_rows(engine)
        unpack_rows(tensors, count, rows)
        if len(rows) != self.rank or trace.shape != () or not bool(trace >= 0):
            raise ValueError(f"{len(rows)} directions and a trace of {trace} are no sketch")
        directions = torch.cat(rows.tensors(), dim=1).T
        norms = directions.norm(dim=0)
        vectors = directions / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        eigen = Eigen(vectors, norms.square(), norms.new_zeros(()))
        sketch = LowRankFactor.of(eigen, trace, torch.float64)
        return self._curvature(sketch, rows, norms.square())

    def to(self, curvature: SketchedCurvature, device: torch.device) -> SketchedCurvature:
        """Return sketch and directions on another device."""
        sketch, rows = curvature.sketch.to(device), curvature.rows.to(device)
        return SketchedCurvature(rows, sketch=sketch, truncation=curvature.truncation)

    def nbytes(self, engine: Engine, examples: int | None, columns: int) -> int:
        """Return the bytes of sketch, test matrix and directions in a fit."""
        n, width = sum(self.sizes), engine.dtype.itemsize
        held = min(sketch_columns(self.rank), n)  # the sketch is in float64
        return n * (held * (torch.float64.itemsize + width) + self.rank * width)

    def arguments(self) -> dict[str, Any]:
        """Return the number of directions."""
        return {"rank": self.rank}
