"""Sums of Kronecker factors with dense or low-rank sides, in laplace-torch's protocol.

Adding, scaling and decomposing the factors of a whole model lives here. How a factor is filled
belongs to `kfac`, what is done with the eigenvalues to `decomposed`.
"""

from __future__ import annotations

import torch
from laplace.utils import Kron
from torch import Tensor

from laplace_lora.linalg.factors import check_residual, map_shared
from laplace_lora.linalg.kron_eigen import LowRankKronDecomposed
from laplace_lora.linalg.sketch import Factor


class LowRankKron(Kron):
    """Sums of Kronecker factors, one list a trainable tensor, in the order of the parameters.

    A weight has two factors in the order of its dimensions (``[grad_cov, input_cov]`` for a
    ``(out, in)`` weight), a bias one. Projections of the same input share one factor object, and so
    do a weight and its bias; sums, scalings and decompositions keep them shared.

    Args:
        kfacs: Factors of each trainable tensor.
        residual: What stands for the directions a low-rank side leaves out when decomposed:
            ``"isotropic"`` spreads the missing trace evenly, ``"zero"`` drops it.

    Raises:
        ValueError: If ``residual`` is neither.
    """

    kfacs: list[list[Factor]]

    def __init__(self, kfacs: list[list[Factor]], residual: str = "isotropic") -> None:
        check_residual(residual)
        super().__init__(kfacs)
        self.residual = residual

    def __add__(self, other: Kron) -> LowRankKron:
        """Add another `LowRankKron`, or a plain `Kron` of the same shapes."""
        if not isinstance(other, Kron) or list(map(len, other.kfacs)) != list(map(len, self.kfacs)):
            raise ValueError("can only add Kron objects over the same parameters")
        pairs = [list(zip(X, Y, strict=True)) for X, Y in zip(self.kfacs, other.kfacs, strict=True)]
        memo: dict[tuple[int, int], Factor] = {}
        for x, y in (pair for block in pairs for pair in block):
            if (id(x), id(y)) not in memo:
                memo[id(x), id(y)] = x.add(y)
        return self._with([[memo[id(x), id(y)] for x, y in block] for block in pairs])

    __radd__ = __add__

    def __mul__(self, scalar: float | Tensor) -> LowRankKron:
        """Scale every block through its last factor."""
        last = map_shared([X[-1:] for X in self.kfacs], lambda x: x * scalar)
        return self._with([[*X[:-1], *x] for X, x in zip(self.kfacs, last, strict=True)])

    __rmul__ = __mul__

    def scale_inputs(self, scalar: float) -> LowRankKron:
        """Return a copy whose second factors are scaled, the side that carries ``1/N``."""
        inputs = map_shared([X[1:] for X in self.kfacs], lambda x: x * scalar)
        return self._with([[*X[:1], *x] for X, x in zip(self.kfacs, inputs, strict=True)])

    def joined(self, n: int, other: LowRankKron, m: int) -> LowRankKron:
        """Return the factors of ``n`` examples together with those of ``m`` others."""
        # Input covariances are means over the data, gradient covariances sums.
        return self.scale_inputs(n / (n + m)) + other.scale_inputs(m / (n + m))

    def decomposition(self) -> tuple[LowRankKron, LowRankKronDecomposed]:
        """Return the factors, and the eigendecomposition that a posterior uses."""
        return self, self.decompose()

    def factors(self) -> list[Factor]:
        """Return every factor, shared ones once."""
        return list({id(x): x for X in self.kfacs for x in X}.values())

    @property
    def nbytes(self) -> int:
        """Bytes held by all factors, shared ones counted once."""
        return sum(factor.nbytes for factor in self.factors())

    def to(self, device: torch.device | str) -> LowRankKron:
        """Return the factors on another device."""
        return self._with(map_shared(self.kfacs, lambda x: x.to(device)))

    def decompose(self, damping: bool = False) -> LowRankKronDecomposed:
        """Eigendecompose every factor once.

        Args:
            damping: Must be false: laplace-torch's damping is lost once a prior is added.

        Raises:
            ValueError: If ``damping`` is asked for.
            FloatingPointError: If a factor is not finite.
        """
        if damping:
            raise ValueError("damping is not supported: it would have no effect on the posterior")
        return LowRankKronDecomposed(map_shared(self.kfacs, lambda x: x.decompose(self.residual)))

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

    def _with(self, kfacs: list[list[Factor]]) -> LowRankKron:
        return LowRankKron(kfacs, self.residual)
