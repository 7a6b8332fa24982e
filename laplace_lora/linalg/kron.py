"""Sums of Kronecker factors with dense or low-rank sides: adding, scaling and decomposing them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from laplace_lora.linalg.factors import check_residual, map_shared
from laplace_lora.linalg.kron_block import Side
from laplace_lora.linalg.kron_eigen import KronEigen
from laplace_lora.linalg.sketch import Factor

Self = TypeVar("Self", bound="KronFactors")


class KronFactors:
    """Sums of Kronecker factors, one list per trainable tensor, in the order of the parameters.

    A weight has two factors in the order of its dimensions (``[grad_cov, input_cov]`` for a
    ``(out, in)`` weight), of which the second is a mean over the data; a bias has one. Projections
    of the same input share one factor object, and so do a weight and its bias, unless the weight is
    ``(in, out)`` and has the mean of what the bias has the sum of; sums, scalings and
    decompositions keep them shared.

    Args:
        kfacs: Factors of each trainable tensor.
        residual: What replaces the directions that a low-rank side leaves out when decomposed:
            ``"isotropic"`` spreads the missing trace evenly, ``"zero"`` drops it.

    Raises:
        ValueError: If ``residual`` is unknown.
    """

    def __init__(self, kfacs: list[list[Factor]], residual: str = "isotropic") -> None:
        check_residual(residual)
        self.kfacs = kfacs
        self.residual = residual

    def __len__(self) -> int:
        return len(self.kfacs)

    def added(self: Self, kfacs: Sequence[Sequence[Any]]) -> Self:
        """Return the sums with other factors of the same kind, or with dense matrices.

        Raises:
            ValueError: If the numbers of factors differ.
        """
        if list(map(len, kfacs)) != list(map(len, self.kfacs)):
            raise ValueError("can only add Kron objects over the same parameters")
        pairs = [list(zip(X, Y, strict=True)) for X, Y in zip(self.kfacs, kfacs, strict=True)]
        sums: dict[tuple[int, int], Factor] = {}  # a pair that several blocks share is added once
        for x, y in (pair for block in pairs for pair in block):
            if (id(x), id(y)) not in sums:
                sums[id(x), id(y)] = x.add(y)
        return self._with([[sums[id(x), id(y)] for x, y in block] for block in pairs])

    def __add__(self: Self, other: KronFactors) -> Self:
        return self.added(other.kfacs)

    def __mul__(self: Self, scalar: float | Tensor) -> Self:
        """Scale every block through its last factor."""
        last = map_shared([X[-1:] for X in self.kfacs], lambda x: x * scalar)
        return self._with([[*X[:-1], *x] for X, x in zip(self.kfacs, last, strict=True)])

    __rmul__ = __mul__

    def scale_inputs(self: Self, scalar: float) -> Self:
        """Return a copy with scaled second factors, which contain ``1/N``."""
        seconds = map_shared([X[1:] for X in self.kfacs], lambda x: x * scalar)
        return self._with([[*X[:1], *x] for X, x in zip(self.kfacs, seconds, strict=True)])

    def joined(self: Self, n: int, other: Self, m: int) -> Self:
        """Return the factors of ``n`` examples together with those of ``m`` others."""
        # Second factors are means over the data, all others sums.
        return self.scale_inputs(n / (n + m)) + other.scale_inputs(m / (n + m))

    def factors(self) -> list[Factor]:
        """Return every factor, shared ones once."""
        return list({id(x): x for X in self.kfacs for x in X}.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by all factors, shared ones counted once."""
        return sum(factor.nbytes for factor in self.factors())

    def to(self: Self, device: torch.device | str) -> Self:
        """Return the factors on another device."""
        return self._with(map_shared(self.kfacs, lambda x: x.to(device)))

    def decompose(self, damping: bool = False) -> KronEigen:
        """Eigendecompose every factor once.

        Args:
            damping: Must be false: laplace-torch's damping is lost once a prior is added.

        Raises:
            ValueError: If ``damping`` is true.
            FloatingPointError: If a factor is not finite.
        """
        if damping:
            raise ValueError("damping is not supported: it would have no effect on the posterior")
        return self._decomposed(map_shared(self.kfacs, lambda x: x.decompose(self.residual)))

    def bmm(self, W: Tensor, exponent: float = 1) -> Tensor:
        """Return ``H^exponent W`` for ``W`` of shape ``(…, parameters)``."""
        return self.decompose().bmm(W, exponent)

    def logdet(self) -> Tensor:
        """Return the log determinant of all blocks, a scalar."""
        return self.decompose().logdet()

    def diag(self) -> Tensor:
        """Return the diagonal, shape ``(parameters,)``."""
        return self.decompose().diag()

    def to_matrix(self) -> Tensor:
        """Return the dense matrix, shape ``(parameters, parameters)``; for tests."""
        return self.decompose().to_matrix()

    def _with(self: Self, kfacs: list[list[Factor]]) -> Self:
        return type(self)(kfacs, self.residual)

    def _decomposed(self, blocks: list[list[Side]]) -> KronEigen:
        return KronEigen(blocks)
