"""One block of a Kronecker-factored matrix in its eigenbasis.

Each side has eigenvectors and possibly directions left out, so a block has up to four parts:
eigenvectors × eigenvectors, eigenvectors × left out, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from laplace_lora.linalg.eigen import DiagonalEigen, Eigen
from laplace_lora.linalg.row_products import products_of_rows, weighted_products

Side = Eigen | DiagonalEigen
Function = Callable[[Tensor], Tensor]  # of eigenvalues


@dataclass(frozen=True)
class KronBlock:
    """A symmetric matrix over ``(p, q)`` weights with eigenvectors ``u vᵀ``.

    Attributes:
        left: Eigenvectors ``u`` of the rows' side.
        right: Eigenvectors ``v`` of the columns' side.
        table: Eigenvalues. One row per eigenvector of the left side, and a last row that stands
            for each direction left out, if there are any; columns likewise for the right side.
    """

    left: Side
    right: Side
    table: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Lengths ``(p, q)`` of the sides."""
        return self.left.d, self.right.d

    @cached_property
    def parts(self) -> list[list[Tensor]]:
        """The eigenvalues of each part, by the parts of the left and the right side."""
        rows, columns = (
            [len(values) for values, _ in side.parts()] for side in (self.left, self.right)
        )
        return [list(row.split(columns, dim=1)) for row in self.table.split(rows)]

    def spectrum(self) -> Iterator[tuple[Tensor, int]]:
        """Yield the eigenvalues of each part, and the multiplicity of each of them."""
        for (_, left_count), row in zip(self.left.parts(), self.parts, strict=True):
            for (_, right_count), e in zip(self.right.parts(), row, strict=True):
                yield e, left_count * right_count

    def pieces(self, W: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the coordinates of ``W``, ``(…, p, q)``, in each part, and its eigenvalues."""
        for part, row in zip(self.left.split(W, -2), self.parts, strict=True):
            yield from zip(self.right.split(part, -1), row, strict=True)

    def apply(self, W: Tensor, function: Function) -> Tensor:
        """Return ``f(block) W`` for ``W`` of shape ``(…, p, q)``."""
        rows = self._rows([piece * function(e) for piece, e in self.pieces(W)])
        return self.left.join([self.right.join(row, -1) for row in rows], -2)

    def diagonal(self, function: Function) -> Tensor:
        """Return the diagonal of ``f(block)``, shape ``(p, q)``."""
        rows = [self.right.matrix_diagonal([function(e).T for e in row]).T for row in self.parts]
        return self.left.matrix_diagonal(rows)

    def inverse_form(self, W: Tensor, delta: Tensor) -> Tensor:
        """Return ``W (block + δ)⁻¹ Wᵀ`` for a batch of rows.

        Args:
            W: Shape ``(batch, outputs, *shape of the parameter)``.
            delta: ``δ``, a scalar.

        Returns:
            Shape ``(batch, outputs, outputs)``.
        """
        forms = [
            products_of_rows((piece / (e + delta)).flatten(2), piece.flatten(2))
            for piece, e in self.pieces(W.reshape(*W.shape[:2], *self.shape))
        ]
        return sum(forms[1:], forms[0])

    def forms(self, W: Tensor, functions: Function) -> Tensor:
        """Return ``W f(block) Wᵀ`` for a batch of rows and several functions ``f``.

        Args:
            W: Shape ``(batch, outputs, *shape of the parameter)``.
            functions: From eigenvalues, ``(K,)``, to their values, ``(K, functions)``.

        Returns:
            Shape ``(batch, outputs, outputs, functions)``.
        """
        forms = []
        for piece, e in self.pieces(W.reshape(*W.shape[:2], *self.shape)):
            if e.shape == piece.shape[-2:]:
                forms.append(weighted_products(piece.flatten(2), e.flatten(), functions))
                continue
            # Of directions that share an eigenvalue only the sum of the products is needed.
            kept = "" if e.numel() == 1 else "a" if e.shape[1] == 1 else "b"
            products = torch.einsum(f"ncab,nkab->nck{kept}", piece, piece)
            forms.append(products.reshape(*products.shape[:3], -1) @ functions(e.flatten()))
        return sum(forms[1:], forms[0])

    def gram_diagonal(self, W: Tensor) -> Tensor:
        """Return the diagonal of ``Wᵀ W`` in this eigenbasis, ``Σ (uᵀ W v)²``.

        Directions left out share the mean of their diagonal, so the trace is that of ``Wᵀ W``.

        Args:
            W: Rows, shape ``(…, *shape of the parameter)``.

        Returns:
            Shaped like `table`.
        """
        W = W.reshape(-1, *self.shape)
        sums = [piece.square().sum(0).sum_to_size(e.shape) for piece, e in self.pieces(W)]
        left, right = (
            torch.cat([torch.full_like(values, count) for values, count in side.parts()])
            for side in (self.left, self.right)
        )
        table = torch.cat([torch.cat(row, dim=1) for row in self._rows(sums)])
        return table / torch.outer(left, right)

    def diagonal_in(self, other: KronBlock) -> Tensor:
        """Return this matrix's diagonal in another block's eigenbasis.

        Of all diagonals there, this is nearest to the matrix in Frobenius norm. Directions left
        out there share the mean of their diagonal, so the trace stays.

        Returns:
            Shaped like the other's `table`.
        """
        rows = other.left.diagonal_from(self.left, self.table.double())
        return other.right.diagonal_from(self.right, rows.T).T.to(self.table.dtype)

    def _rows(self, pieces: list[Tensor]) -> list[list[Tensor]]:
        length = len(self.right.parts())
        return [pieces[start : start + length] for start in range(0, len(pieces), length)]
