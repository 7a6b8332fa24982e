"""Eigendecomposed Kronecker blocks plus a prior: any function of the posterior's eigenvalues.

``f(scale · H + δ)`` serves covariances, samples, norms, determinants and diagonals alike, and one
eigendecomposition serves every ``δ``. Nothing ``d × d`` is formed on a low-rank side. How factors
are summed belongs to `kron`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from laplace.utils.matrix import KronDecomposed
from torch import Tensor

from laplace_lora.diagonal import DiagonalEigen
from laplace_lora.factors import Eigen, map_shared

Side = Eigen | DiagonalEigen
Spectrum = Callable[[Tensor], Tensor]


class LowRankKronDecomposed(KronDecomposed):
    """A block-diagonal matrix ``scale · (left ⊗ right) + δ`` held as eigendecompositions.

    With kept directions and a residual on each side a block has up to four parts: kept × kept with
    eigenvalues ``scale λ_i μ_j + δ``, kept × residual, residual × kept and residual × residual.

    Args:
        blocks: Eigendecompositions of each block's factors; a bias has one.
        deltas: Prior precision of each block, shape ``(blocks,)``; zero when ``None``.
        scale: Factor of the curvature, laplace-torch's ``_H_factor``; gradients flow through it.
    """

    def __init__(
        self,
        blocks: list[list[Side]],
        deltas: Tensor | None = None,
        scale: float | Tensor = 1.0,
    ) -> None:
        self.blocks = blocks
        self.scale = scale
        self.damping = False
        reference = blocks[0][0].values
        self.deltas = reference.new_zeros(len(blocks)) if deltas is None else deltas
        self._check_deltas(self.deltas)

    @property
    def eigenvectors(self) -> list[list[Tensor]]:
        """Kept eigenvectors of each factor, ``(d, k)``."""
        return [[side.vectors for side in sides] for sides in self.blocks]

    @property
    def eigenvalues(self) -> list[list[Tensor]]:
        """Kept eigenvalues of each factor, ``(k,)``, before ``scale``."""
        return [[side.values for side in sides] for sides in self.blocks]

    def __len__(self) -> int:
        return len(self.blocks)

    def __add__(self, deltas: Tensor) -> LowRankKronDecomposed:
        """Add a prior precision, a scalar or one value a block."""
        self._check_deltas(deltas)
        return LowRankKronDecomposed(self.blocks, self.deltas + deltas, self.scale)

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> LowRankKronDecomposed:
        """Scale the curvature, not the prior, as laplace-torch does."""
        return LowRankKronDecomposed(self.blocks, self.deltas, self.scale * scalar)

    __rmul__ = __mul__

    def spectrum(self, i: int) -> Iterator[tuple[Tensor, int]]:
        """Yield block ``i``'s eigenvalues without ``δ``, with the multiplicity of each.

        Yields:
            ``scale · outer(λ, μ)`` of one of the up to four parts, and how often each value counts.
        """
        left, right = self._sides(i)
        for values, times in left.parts():
            for others, more in right.parts():
                yield self.scale * torch.outer(values, others), times * more

    def logdet(self) -> Tensor:
        """Return ``Σ log(e + δ)`` over all eigenvalues, a float64 scalar."""
        return self._sum(lambda e, delta: torch.log(e + delta))

    def log_det_ratio(self) -> Tensor:
        """Return ``Σ log(1 + e/δ)``, the log determinant relative to the prior's, in float64.

        Summed this way nothing cancels, however many parameters the data say nothing about.
        """
        return self._sum(lambda e, delta: torch.log1p(e / delta))

    def apply(self, i: int, W: Tensor, function: Spectrum) -> Tensor:
        """Return ``f(block i) W`` for ``W`` of shape ``(…, rows, columns)`` of the parameter."""
        left, right = self._sides(i)
        rows = []
        for part, values in left.split(W, dim=-2):
            columns = [
                piece * function(self._eigenvalues(values, others) + self.deltas[i])
                for piece, others in right.split(part, dim=-1)
            ]
            rows.append(right.join(columns, dim=-1))
        return left.join(rows, dim=-2)

    def inverse_form(self, i: int, W: Tensor) -> Tensor:
        """Return ``W (block i)⁻¹ Wᵀ`` for a batch of rows of the Jacobian.

        Args:
            i: Block.
            W: Jacobian block, shape ``(batch, outputs, *shape of the parameter)``.

        Returns:
            Shape ``(batch, outputs, outputs)``.
        """
        left, right = self._sides(i)
        W = W.flatten(2).unflatten(-1, self._shape(i))
        total = W.new_zeros(W.shape[0], W.shape[1], W.shape[1])
        for part, values in left.split(W, dim=-2):
            for piece, others in right.split(part, dim=-1):
                scaled = piece / (self._eigenvalues(values, others) + self.deltas[i])
                total.baddbmm_(scaled.flatten(2), piece.flatten(2).mT)
        return total

    def grams(self, i: int, W: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return ``W (block i)⁻¹ Wᵀ`` as a function of ``δ``.

        Args:
            i: Block.
            W: Jacobian block, shape ``(batch, outputs, *shape of the parameter)``.

        Returns:
            Pairs of eigenvalues without ``δ``, ``(K,)``, and products ``M``, ``(batch, outputs,
            outputs, K)``; the form is ``Σ_k M_k / (e_k + δ)`` summed over the pairs.
        """
        left, right = self._sides(i)
        W = W.flatten(2).unflatten(-1, self._shape(i))
        result = []
        for part, values in left.split(W, dim=-2):
            for piece, others in right.split(part, dim=-1):
                e = self._eigenvalues(values, others)
                # Directions of one eigenvalue need only the sum of their products.
                summed = "ab" if e.numel() == 1 else "b" if e.shape[1] == 1 else "a"
                if e.shape == piece.shape[-2:]:
                    flat = piece.flatten(2)
                    products = flat.unsqueeze(2) * flat.unsqueeze(1)
                else:
                    kept = "ab".translate({ord(letter): None for letter in summed})
                    products = torch.einsum(f"ncab,nkab->nck{kept}", piece, piece)
                result.append((e.flatten(), products.reshape(*products.shape[:3], -1)))
        return result

    def inv_square_form(self, W: Tensor) -> Tensor:
        """Return ``W P⁻¹ Wᵀ`` for ``W`` of shape ``(batch, outputs, parameters)``."""
        total = W.new_zeros(W.shape[0], W.shape[1], W.shape[1])
        for i, part in enumerate(W.split(self._sizes(), dim=-1)):
            total += self.inverse_form(i, part)
        return total

    def _bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        pieces = []
        for i, part in enumerate(W.split(self._sizes(), dim=-1)):
            block = part.unflatten(-1, self._shape(i))
            pieces.append(self.apply(i, block, lambda e: e.pow(exponent)).flatten(-2))
        return torch.cat(pieces, dim=-1)

    def bmm(self, W: Tensor, exponent: float = -1) -> Tensor:
        """Return ``P^exponent W`` for ``W`` of shape ``(…, parameters)``."""
        return self._bmm(W, exponent)

    def diag(self, exponent: float = 1) -> Tensor:
        """Return the diagonal of ``P^exponent``, shape ``(parameters,)``."""
        pieces = []
        for i in range(len(self)):
            left, right = self._sides(i)
            rows = []
            for values, _ in left.parts():
                columns = [
                    (self._eigenvalues(values, others) + self.deltas[i]).pow(exponent).T
                    for others, _ in right.parts()
                ]
                rows.append(right.spread(columns).T)
            pieces.append(left.spread(rows).flatten())
        return torch.cat(pieces)

    def to_matrix(self, exponent: float = 1) -> Tensor:
        """Return the dense ``P^exponent``, shape ``(parameters, parameters)``; for tests."""
        reference = self.blocks[0][0].values
        eye = torch.eye(sum(self._sizes()), dtype=reference.dtype, device=reference.device)
        return self._bmm(eye, exponent)

    def to(self, device: torch.device | str) -> LowRankKronDecomposed:
        """Return the decomposition on another device."""
        blocks = map_shared(self.blocks, lambda side: side.to(device))
        scale = self.scale.to(device) if isinstance(self.scale, Tensor) else self.scale
        return LowRankKronDecomposed(blocks, self.deltas.to(device), scale)

    def _sides(self, i: int) -> tuple[Side, Side]:
        sides = self.blocks[i]
        if len(sides) == 2:
            return sides[0], sides[1]
        one = sides[0].values.new_ones(1)
        return sides[0], Eigen(one.unsqueeze(1), one, one.new_zeros(()))

    def _eigenvalues(self, values: Tensor, others: Tensor) -> Tensor:
        return self.scale * torch.outer(values, others)

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
                for i in range(len(self))
                for e, times in self.spectrum(i)
            ]
        ).sum()
