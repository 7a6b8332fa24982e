"""Which rows of a map's inputs and output gradients enter K-FAC's sums, and with what weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.adapters.maps import LinearMap
from laplace_lora.data.masks import real_rows
from laplace_lora.linalg.sketch import Factor

APPROXIMATIONS = ("expand", "reduce")
POSITIONS = ("all", "last")


@dataclass(frozen=True)
class KfacRows:
    """Which rows of a map's inputs and output gradients enter its covariances.

    Attributes:
        approximation: ``"expand"`` or ``"reduce"``, see `KfacSums`.
        positions: ``"all"`` real tokens, or the ``"last"`` one of each example alone.

    Raises:
        ValueError: If either is unknown.
    """

    approximation: str = "expand"
    positions: str = "all"

    def __post_init__(self) -> None:
        if self.approximation not in APPROXIMATIONS:
            raise ValueError(
                f"kfac_approx must be one of {APPROXIMATIONS}, got {self.approximation!r}"
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, got {self.positions!r}")

    def have_diagonal_sum(self, linear: LinearMap) -> bool:
        """Return whether a map's input covariance is diagonal, whatever the data."""
        return linear.has_unit_inputs and self.approximation == "expand"

    def of_input(
        self, x: Tensor, mask: Tensor | None, factor: Factor
    ) -> tuple[Tensor, float | Tensor]:
        """Return the rows of an input, and the weight of their outer products, or one for each.

        Args:
            x: Input, ``(batch, tokens, q)`` or ``(batch, q)``.
            mask: Real tokens, ``(batch, tokens)``; ``None`` if all are.
            factor: Where they go: gives the dtype, and is one longer than ``q`` if a 1 is
                to be appended to each input.
        """
        if factor.d == x.shape[-1] + 1:
            x = F.pad(x, (0, 1), value=1.0)
        if x.ndim == 2:
            return x, 1.0
        mask = self._seen(x, mask)
        if self.approximation == "reduce":
            means = _real_tokens(x.to(factor.dtype), mask).sum(1) / _counts(x, mask, factor.dtype)
            return means, 1.0
        if mask is None:
            return x.flatten(0, 1), 1 / x.shape[1]
        weights = _counts(x, mask, factor.dtype).reciprocal().expand(mask.shape)
        return real_rows(x, mask), real_rows(weights, mask)

    def of_grad(self, grad: Tensor, mask: Tensor | None) -> Tensor:
        """Return the rows of an output gradient, ``(batch, tokens, p)`` or ``(batch, p)``."""
        if grad.ndim == 2:
            return grad
        mask = self._seen(grad, mask)
        if self.approximation == "reduce":
            return _real_tokens(grad, mask).sum(1)
        return grad.flatten(0, 1) if mask is None else real_rows(grad, mask)

    def _seen(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        if self.positions == "all":
            return mask
        tokens = torch.arange(x.shape[1], device=x.device)
        last = tokens[-1:] if mask is None else (tokens * mask).argmax(-1)
        return (tokens == last.unsqueeze(-1)).expand(x.shape[:2])


def _real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x`` with padding replaced by zeros, whatever stood there."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


def _counts(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return the number of real tokens of each example, ``(batch, 1)``."""
    if mask is None:
        return torch.full((x.shape[0], 1), x.shape[1], dtype=dtype, device=x.device)
    return mask.sum(1, keepdim=True).clamp(min=1).to(dtype)
