"""Eigendecomposed Kronecker blocks plus a prior: any function of the posterior's eigenvalues.

``f(scale · H + δ)`` serves covariances, samples, norms, determinants and diagonals alike, and one
eigendecomposition serves every ``δ``. Nothing ``d × d`` is formed on a low-rank side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import map_shared
from laplace_lora.linalg.kron_block import Function, KronBlock, Side

Self = TypeVar("Self", bound="KronEigen")


class KronEigen:
    """A block-diagonal matrix ``scale · (left ⊗ right) + δ`` held as eigendecompositions.

    The eigenvalues of a block are ``scale λ_i μ_j + δ`` on its eigenvectors, and likewise with a
    side's residual in place of ``λ_i`` or ``μ_j``. Other eigenvalues of the same eigenvectors may
    replace the products.

    Args:
        blocks: Eigendecompositions of each block's factors; a bias has one.
        deltas: Prior precision of each block, shape ``(blocks,)``; zero when ``None``.
        scale: Factor of the curvature, laplace-torch's ``_H_factor``; gradients flow through it.
        tables: Eigenvalues of each block, shaped like `table`; the products when ``None``.
    """

    def __init__(
        self,
        blocks: list[list[Side]],
        deltas: Tensor | None = None,
        scale: float | Tensor = 1.0,
        tables: list[Tensor] | None = None,
    ) -> None:
        self.blocks = blocks
        self.scale = scale
        self.tables = tables
        reference = blocks[0][0].values
        self.deltas = reference.new_zeros(len(blocks)) if deltas is None else deltas
        _check_deltas(self.deltas, len(blocks))
        self._cache: dict[int, KronBlock] = {}

    @property
    def eigenvectors(self) -> list[list[Tensor]]:
        """Eigenvectors of each factor, ``(d, k)``."""
        return [[side.vectors for side in sides] for sides in self.blocks]

    @property
    def eigenvalues(self) -> list[list[Tensor]]:
        """Eigenvalues of each factor without the residual, ``(k,)``, before ``scale``."""
        return [[side.values for side in sides] for sides in self.blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self: Self, deltas: Tensor) -> Self:
        """Add a prior precision, a scalar or one value per block."""
        _check_deltas(deltas, len(self))
        return self._with(self.deltas + deltas, self.scale, self.tables)

    __radd__ = __add__

    def __mul__(self: Self, scalar: float | Tensor) -> Self:
        """Scale the curvature, not the prior, as laplace-torch does."""
        return self._with(self.deltas, self.scale * scalar, self.tables)

    __rmul__ = __mul__

    def table(self, i: int) -> Tensor:
        """Return block ``i``'s eigenvalues before ``scale`` and ``δ``, see `KronBlock`."""
        if self.tables is not None:
            return self.tables[i]
        left, right = (torch.cat([values for values, _ in s.parts()]) for s in self._sides(i))
        return torch.outer(left, right)

    def with_tables(self: Self, tables: list[Tensor]) -> Self:
        """Return the same eigenvectors with other eigenvalues, one `table` per block."""
        return self._with(self.deltas, self.scale, tables)

    def block(self, i: int) -> KronBlock:
        """Return block ``i`` in its eigenbasis, without ``δ``; built once unless differentiated."""
        if i not in self._cache:
            block = KronBlock(*self._sides(i), self.scale * self.table(i))
            if block.table.requires_grad:  # a graph serves one backward pass
                return block
            self._cache[i] = block
        return self._cache[i]

    def spectra(self) -> list[list[tuple[Tensor, int]]]:
        """Return every block's eigenvalues without ``δ``, with the multiplicity of each."""
        return [list(self.block(i).spectrum()) for i in range(len(self))]

    def logdet(self) -> Tensor:
        """Return ``Σ log(e + δ)`` over all eigenvalues, a float64 scalar."""
        return self._sum(lambda e, delta: torch.log(e + delta))

    def log_det_ratio(self) -> Tensor:
        """Return ``Σ log(1 + e/δ)``, the log determinant relative to the prior's, in float64.

        Nothing cancels in this sum, however many directions the data leave undetermined.
        """
        return self._sum(lambda e, delta: torch.log1p(e / delta))

    def covariance(self, jacobians: Iterable[Tensor]) -> Tensor:
        """Return ``J P⁻¹ Jᵀ``, ``(batch, outputs, outputs)``.

        Args:
            jacobians: Rows ``(batch, outputs, *shape)`` of each tensor, in parameter order.
        """
        forms = (self.inverse_form(i, jacobian) for i, jacobian in enumerate(jacobians))
        return sum(forms, next(forms))

    def forms(
        self, jacobians: Iterable[Tensor], functions: Callable[[int, Tensor], Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each tensor's part of ``J f(P) Jᵀ`` for several functions, see `KronBlock`."""
        for i, jacobian in enumerate(jacobians):
            yield i, self.block(i).forms(jacobian, partial(functions, i))

    def root_multiply(self, noise: Tensor) -> Tensor:
        """Return ``P^-½ ε`` for ``ε`` of shape ``(n, parameters)``."""
        return self.bmm(noise, exponent=-0.5)

    def variance(self) -> Tensor:
        """Return the diagonal of ``P⁻¹``, ``(parameters,)``."""
        return self.diag(-1)

    def inverse_form(self, i: int, W: Tensor) -> Tensor:
        """Return ``W (block i)⁻¹ Wᵀ`` for a batch of rows of the Jacobian.

        Args:
            i: Block.
            W: Jacobian block, shape ``(batch, outputs, *shape of the parameter)``.

        Returns:
            Shape ``(batch, outputs, outputs)``.
        """
        return self.block(i).inverse_form(W, self.deltas[i])

    def gram_diagonal(self, i: int, W: Tensor) -> Tensor:
        """Return the diagonal of ``Wᵀ W`` in block ``i``'s eigenbasis, see `KronBlock`."""
        return self.block(i).gram_diagonal(W)

    def diagonals_in(self, other: KronEigen) -> list[Tensor]:
        """Return each block's diagonal without ``δ`` in another eigenbasis, see `KronBlock`."""
        return [self.block(i).diagonal_in(other.block(i)) for i in range(len(self))]

    def inv_square_form(self, W: Tensor) -> Tensor:
        """Return ``W P⁻¹ Wᵀ`` for ``W`` of shape ``(batch, outputs, parameters)``."""
        return self.covariance(W.split(self._sizes(), dim=-1))

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """Return ``P^exponent W`` for ``W`` of shape ``(…, parameters)``."""
        pieces = []
        for i, part in enumerate(W.split(self._sizes(), dim=-1)):
            block = part.unflatten(-1, self._shape(i))
            pieces.append(self.block(i).apply(block, self._power(i, exponent)).flatten(-2))
        return torch.cat(pieces, dim=-1)

    def diag(self, exponent: float = 1) -> Tensor:
        """Return the diagonal of ``P^exponent``, shape ``(parameters,)``."""
        blocks = (self.block(i).diagonal(self._power(i, exponent)) for i in range(len(self)))
        return torch.cat([block.flatten() for block in blocks])

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """Return the dense ``P^exponent``, shape ``(parameters, parameters)``; for tests."""
        reference = self.blocks[0][0].values
        eye = torch.eye(sum(self._sizes()), dtype=reference.dtype, device=reference.device)
        return self.bmm(eye, exponent)

    def to(self: Self, device: torch.device | str) -> Self:
        """Return the decomposition on another device."""
        blocks = map_shared(self.blocks, lambda side: side.to(device))
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        tables = None if self.tables is None else [table.to(device) for table in self.tables]
        return type(self)(blocks, self.deltas.to(device), scale, tables)

    def _power(self, i: int, exponent: float) -> Function:
        return lambda e: (e + self.deltas[i]).pow(exponent)

    def _sides(self, i: int) -> tuple[Side, Side]:
        sides = self.blocks[i]
        if len(sides) == 2:
            return sides[0], sides[1]
        unit = sides[0].values.new_ones(1)
        return sides[0], Eigen(unit.unsqueeze(1), unit, unit.new_zeros(()))

    def _with(
        self: Self, deltas: Tensor, scale: float | Tensor, tables: list[Tensor] | None
    ) -> Self:
        return type(self)(self.blocks, deltas, scale, tables)

    def _shape(self, i: int) -> tuple[int, int]:
        left, right = self._sides(i)
        return left.d, right.d

    def _sizes(self) -> list[int]:
        return [self._shape(i)[0] * self._shape(i)[1] for i in range(len(self))]

    def _sum(self, term: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        deltas = self.deltas.double().expand(len(self))
        return torch.stack(
            [
                times * term(e.double(), deltas[i]).sum()
                for i, spectrum in enumerate(self.spectra())
                for e, times in spectrum
            ]
        ).sum()


def _check_deltas(deltas: Tensor, blocks: int) -> None:
    if not isinstance(deltas, Tensor) or deltas.ndim > 1 or deltas.numel() not in (1, blocks):
        raise ValueError(
            f"Invalid shape of delta: a prior precision is a tensor of one value, or one per block "
            f"({blocks}), got {deltas!r}"
        )
