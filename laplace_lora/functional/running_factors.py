"""Covariances that hooks are summing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.factors import DenseFactor
from laplace_lora.linalg.sketch import Factor
from laplace_lora.models.changes.autocast import in_full_precision


@in_full_precision
def factor_tensor(factor: Factor) -> Tensor:
    """Return a dense sum's matrix ``(d, d)``, or the root ``(d, rank)`` of a sketched one."""
    if isinstance(factor, DenseFactor):
        return factor.matrix
    eigen = factor.decompose("zero")
    return eigen.vectors * eigen.values.sqrt()


class RunningFactor:
    """A covariance that hooks are summing; unpacks into ``(tensor, low_rank)`` at any time.

    Args:
        factor: The sum so far.
    """

    def __init__(self, factor: Factor) -> None:
        self.factor = factor

    def __getitem__(self, index: int) -> Tensor | bool:
        return tuple(self)[index]

    def __iter__(self) -> Iterator[Tensor | bool]:
        return iter((factor_tensor(self.factor), not isinstance(self.factor, DenseFactor)))

    def __len__(self) -> int:
        return 2


def running(
    sums: dict[str, RunningFactor],
    name: str,
    rows: Tensor,
    d: int,
    n_kfac: int | None,
    lr_threshold: int,
    dtype: torch.dtype | None,
) -> Factor:
    """Return a module's sum, begun anew if there is none yet.

    Args:
        sums: By module; holds the result.
        name: Of the module.
        rows: To be added: give the device, and the dtype if ``dtype`` is ``None``.
        d: Side of the covariance.
        n_kfac: Rank of a low-rank factor; ``None`` keeps it dense.
        lr_threshold: Sides shorter than this stay dense.
        dtype: Of the sum.
    """
    if name not in sums:
        dtype = dtype or torch.promote_types(torch.float32, rows.dtype)
        sums[name] = RunningFactor(
            FactorSpec(n_kfac, lr_threshold - 1).empty(d, dtype, rows.device)
        )
    return sums[name].factor
