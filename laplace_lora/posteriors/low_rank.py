"""`LowRankLoraLaplace`: the GGN of all adapter weights together, truncated to a few directions.

This room sketches the GGN while the data pass by; what is done with its directions belongs to
`gram_posterior`, the sketch's algebra to `sketch`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.linalg.row_storage import RowStorage
from laplace_lora.linalg.sketch import Factor, LowRankFactor, empty_factor, sketch_columns
from laplace_lora.structures.rows import GramPosterior


class LowRankLoraLaplace(GramPosterior):
    """Laplace posterior with the leading directions of the GGN of all adapter weights.

    The whole GGN is sketched by a `LowRankFactor` while the data pass by, so memory does not grow
    with them; sketches of batches, loaders and processes add up. Directions beyond ``rank`` keep
    the prior: the GGN of ``N`` examples has rank ``N (C − 1)`` at most, and where that is no more
    than ``rank`` the posterior is `FullLoraLaplace`'s.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"`` or ``"regression"``.
        rank: Directions kept; the sketch takes ``2 rank + 10`` numbers a weight.
        **kwargs: Arguments of `LoraPosterior`.

    Attributes:
        truncation: Share of the GGN's trace that the kept directions miss, after a fit.

    Raises:
        ValueError: If ``rank`` is not positive.
    """

    _key = ("lora", "lowrank")
    _memory_advice = "lower `rank`, or cover fewer `modules`"
    truncation: float
    sketch: Factor

    def __init__(
        self, model: nn.Module, likelihood: str, *, rank: int = 128, **kwargs: Any
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        super().__init__(model, likelihood, **kwargs)
        self.rank = rank

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model and backend."""
        return {**super().arguments(), "rank": self.rank}

    @property
    def curvature(self) -> Factor:
        """The sketch of the summed loss's GGN."""
        self._check_H_init()
        return self.sketch

    def curvature_size(self) -> int:
        """Return how many numbers sketch, test matrix and directions hold."""
        columns = min(sketch_columns(self.rank), self.n_params)
        return self.n_params * (2 * columns + self.rank)

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        loss, blocks = self.backend.root_blocks(x, y)
        parts = [self._checked_rows(i, block) for i, block in enumerate(blocks)]
        # A sketch needs a row's product with the test matrix first, over all tensors.
        state = self._empty() if state is None else state
        state.update(torch.cat(parts, dim=1))
        return loss, state

    def _empty(self) -> Factor:
        return empty_factor(self.n_params, self.rank, 0, self._dtype, self._device)

    def _tensors(self, state: Factor) -> list[Tensor]:
        return state.tensors()

    def _joined(self, curvature: Any, n: int, other: Any, m: int) -> Factor:
        return curvature.add(other)

    def _install(self, curvature: Factor) -> None:
        eigen = curvature.decompose("zero")
        values, order = eigen.values.sort(descending=True)
        values, order = values[: self.rank], order[: self.rank]
        sizes = [parameter.numel() for parameter in self.params]
        rows = RowStorage(sizes, self._dtype, self._dtype, self._device)
        directions = (eigen.vectors[:, order] * values.sqrt()).T
        for i, part in enumerate(directions.split(sizes, dim=1)):
            rows.append(i, part)
        trace = float(curvature.trace)
        kept = float(values.double().sum())
        self.truncation = max(0.0, 1 - kept / trace) if trace > 0 else 0.0
        self.sketch, self.H, self._eigen = curvature, rows, None

    def _packed(self) -> tuple[dict[str, Tensor], Any]:
        tensors = self.curvature.tensors()
        return {str(i): tensor for i, tensor in enumerate(tensors)}, len(tensors)

    def _unpacked(self, tensors: Mapping[str, Tensor], description: Any) -> Factor:
        factor = self._empty()
        expected = factor.tensors()
        if description != len(expected) or len(tensors) != len(expected):
            raise ValueError("the tensors are not those of a sketch")
        for i, tensor in enumerate(expected):
            found = tensors[str(i)]
            if found.shape != tensor.shape or found.dtype != tensor.dtype:
                raise ValueError(f"the sketch has {found.dtype} of shape {tuple(found.shape)}")
            tensor.copy_(found)
        if isinstance(factor, LowRankFactor) and factor.trace < 0:
            raise ValueError("the sketch has a negative trace")
        return factor

    def to(self, device: torch.device | str) -> LowRankLoraLaplace:
        """Move model and posterior to a device, in place, and return the posterior."""
        super().to(device)
        if self.H is not None:
            self.sketch = self.sketch.to(device)
        return self
