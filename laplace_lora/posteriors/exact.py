"""`FullLoraLaplace` and `LowRankLoraLaplace`: posteriors over all adapter weights together."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.linalg.cholesky import shifted_cholesky
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.linalg.row_storage import STORAGES, RowStorage
from laplace_lora.linalg.sketch import Factor
from laplace_lora.models.changes.autocast import in_full_precision
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.structures.row_curvature import RowCurvature
from laplace_lora.structures.rows import Rows
from laplace_lora.structures.sketched import Sketched

ROW_DTYPES = ("bfloat16", "float32", "float64")


class RowLaplace(LoraLaplace):
    """laplace-torch's names of a posterior with correlations between all weights."""

    def _as_H(self, curvature: RowCurvature) -> RowStorage:
        return curvature.rows

    @property
    def rows(self) -> RowStorage:
        """Rows ``Z`` of which ``Zᵀ Z`` is the curvature of the summed loss.

        Raises:
            AttributeError: If the posterior has not been fitted.
        """
        rows: RowStorage = self.fitted.state.curvature.rows
        return rows

    @property
    def posterior_precision(self) -> RowPrecision:
        """The posterior precision, never formed: see `RowPrecision`."""
        precision = self.fitted.precision
        assert isinstance(precision, RowPrecision)
        return precision

    @property
    @in_full_precision
    def posterior_covariance(self) -> Tensor:
        """Dense posterior covariance, ``(parameters, parameters)``; for small models."""
        return self.posterior_precision.to_matrix(-1)

    @property
    @in_full_precision
    def posterior_scale(self) -> Tensor:
        """Root of `posterior_covariance`, ``(parameters, parameters)``; for small models."""
        return shifted_cholesky(self.posterior_covariance)


class FullLoraLaplace(RowLaplace):
    """Laplace posterior with the exact GGN of all adapter weights, correlations included.

    The GGN is ``Zᵀ Z`` with one row ``Sᵀ J`` per example and class contrast, so its spectrum is
    that of a matrix of rows × rows, and nothing parameters × parameters is ever formed. For ``N``
    examples of ``C`` classes and ``P`` weights it keeps ``N (C − 1) P`` numbers: for some thousand
    examples of a small model exactly what one wants, for more `LowRankLoraLaplace`.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"`` or another of `LoraLaplace`.
        storage: Where the rows are kept: ``"device"``, ``"cpu"``, ``"disk"`` (mapped files in the
            system's temporary folder) or a folder for mapped files, which are deleted with the
            posterior. It changes nothing but memory and time, and is not saved.
        row_dtype: Dtype of the rows, ``"bfloat16"``, ``"float32"`` or ``"float64"``; the widest
            that makes sense when ``None``. Products are taken in float32 or better.
        **kwargs: Arguments of `LoraLaplace`.

    Raises:
        ValueError: If an argument is unknown, or ``row_dtype`` is wider than the rows are.
    """

    _key = ("lora", "full")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        storage: str | os.PathLike[str] = "device",
        row_dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(storage, str) and storage not in STORAGES and os.sep not in storage:
            raise ValueError(
                f"storage must be one of {STORAGES} or a folder with a {os.sep!r}, got {storage!r}"
            )
        name = None if row_dtype is None else str(row_dtype).removeprefix("torch.")
        if name is not None and name not in ROW_DTYPES:
            raise ValueError(f"row_dtype must be one of {ROW_DTYPES}, got {row_dtype!r}")
        dtype = None if name is None else getattr(torch, name)
        super().__init__(model, likelihood, Rows(row_dtype=dtype, storage=storage), **kwargs)

    @property
    def storage(self) -> str | os.PathLike[str]:
        """Where the rows are kept."""
        storage: str | os.PathLike[str] = self.structure.storage  # type: ignore[attr-defined]
        return storage

    @property
    def row_dtype(self) -> torch.dtype:
        """Dtype that the rows are kept in."""
        dtype: torch.dtype = self.structure.dtype  # type: ignore[attr-defined]
        return dtype


class LowRankLoraLaplace(RowLaplace):
    """Laplace posterior with the leading directions of the GGN of all adapter weights.

    The whole GGN is sketched by a `LowRankFactor` while the data pass by, so memory does not grow
    with them; sketches of batches, loaders and processes add up. Directions beyond ``rank`` keep
    the prior: the GGN of ``N`` examples has rank ``N (C − 1)`` at most, and where that is no more
    than ``rank`` the posterior is `FullLoraLaplace`'s.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"`` or another of `LoraLaplace`.
        rank: Directions kept; the sketch takes ``2 rank + 10`` numbers per weight.
        **kwargs: Arguments of `LoraLaplace`.

    Raises:
        ValueError: If ``rank`` is not positive.
    """

    _key = ("lora", "lowrank")

    def __init__(
        self, model: nn.Module, likelihood: str, *, rank: int = 128, **kwargs: Any
    ) -> None:
        if rank < 1:
            raise ValueError(f"rank must be positive, got {rank}")
        super().__init__(model, likelihood, Sketched(rank=rank), **kwargs)

    @property
    def truncation(self) -> float:
        """Share of the GGN's trace that the kept directions miss."""
        return float(self.fitted.state.curvature.truncation)

    @property
    def sketch(self) -> Factor:
        """The sketch of the summed loss's GGN."""
        sketch: Factor = self.fitted.state.curvature.sketch
        return sketch
