"""Kronecker factors and their eigendecompositions as laplace-torch's `Kron` and `KronDecomposed`.

The algebra is in `linalg.kron` and `linalg.kron_eigen`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from laplace.utils import Kron
from laplace.utils.matrix import KronDecomposed
from torch import Tensor

from laplace_lora.adapters.maps import Block, LinearMap
from laplace_lora.linalg.kron import KronFactors
from laplace_lora.linalg.kron_block import Side
from laplace_lora.linalg.kron_eigen import KronEigen
from laplace_lora.linalg.sketch import Factor, LowRankFactor

LONGEST_PLAIN = 8192  # entries of a vector whose diagonal block a plain Kron holds as a matrix


class LowRankKron(KronFactors, Kron):
    """Sums of Kronecker factors, one list per trainable tensor, which laplace-torch can add up.

    Args:
        kfacs: Factors of each trainable tensor, see `KronFactors`.
        residual: ``"isotropic"`` or ``"zero"``, see `KronFactors`.

    Raises:
        ValueError: If ``residual`` is neither.
    """

    kfacs: list[list[Factor]]

    def __add__(self, other: Any) -> LowRankKron:
        """Add another `LowRankKron`, or a plain `Kron` of the same shapes."""
        if not isinstance(other, Kron):
            raise ValueError("can only add Kron objects over the same parameters")
        return self.added(other.kfacs)

    __radd__ = __add__

    def decompose(self, damping: bool = False) -> LowRankKronDecomposed:
        """Eigendecompose every factor once, see `KronFactors.decompose`."""
        eigen = super().decompose(damping)
        assert isinstance(eigen, LowRankKronDecomposed)
        return eigen

    def _decomposed(self, blocks: list[list[Side]]) -> LowRankKronDecomposed:
        return LowRankKronDecomposed(blocks)


class LowRankKronDecomposed(KronEigen, KronDecomposed):
    """A `KronEigen` that laplace-torch takes for its own."""

    damping = False


class DenseKron(Kron):
    """laplace-torch's `Kron`; it decomposes into a `DenseKronDecomposed`."""

    def __add__(self, other: Any) -> DenseKron:
        """Add another `Kron` of the same shapes."""
        return DenseKron(super().__add__(other).kfacs)

    __radd__ = __add__

    def decompose(self, damping: bool = False) -> KronDecomposed:
        """Eigendecompose every factor once."""
        plain = super().decompose(damping)
        return DenseKronDecomposed(
            plain.eigenvectors, plain.eigenvalues, plain.deltas, plain.damping
        )


class DenseKronDecomposed(KronDecomposed):
    """laplace-torch's `KronDecomposed` with gradients by the scale, so by a regression's noise.

    laplace-torch takes the scale's power as a plain number, without its gradient.
    """

    def __mul__(self, scalar: Any) -> KronDecomposed:
        """Multiply the curvature by a number."""
        if not (isinstance(scalar, Tensor) and scalar.requires_grad):
            return super().__mul__(scalar)
        scaled = [[scalar ** (1 / len(side)) * e for e in side] for side in self.eigenvalues]
        return KronDecomposed(self.eigenvectors, scaled, self.deltas)

    __rmul__ = __mul__


def plain_kron(kron: LowRankKron, maps: Sequence[LinearMap], blocks: Sequence[Block]) -> Kron:
    """Return dense factors as laplace-torch's `Kron`.

    Args:
        kron: Factors of which none is low-rank.
        maps: The linear maps.
        blocks: The trainable tensors, in the order of the factors.

    Raises:
        ValueError: If it would have to hold the diagonal block of a matrix or of a long vector.
    """
    for block in blocks:
        p = block.parameter
        if maps[block.map].is_diagonal and (p.ndim != 1 or len(p) > LONGEST_PLAIN):
            raise ValueError(
                f"a plain Kron cannot hold the diagonal block of {block.name!r}, of shape "
                f"{tuple(p.shape)}; use KronLoraLaplace, give `factor_rank`, or freeze it"
            )
    return DenseKron(
        [[f.matrix for f in F if not isinstance(f, LowRankFactor)] for F in kron.kfacs]
    )
