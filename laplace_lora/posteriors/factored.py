"""`KronLoraLaplace` and `DiagLoraLaplace`: posteriors with a block per tensor."""

from __future__ import annotations

from typing import Any

from laplace import DiagLaplace, KronLaplace
from torch import nn

from laplace_lora.curvature.kron_protocol import LowRankKron, LowRankKronDecomposed
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.structures.diagonal import Diagonal
from laplace_lora.structures.kron import Kron, KronCurvature


class KronNames(LoraLaplace):
    """laplace-torch's names of Kronecker factors, over a posterior's state."""

    def _as_H(self, curvature: KronCurvature) -> LowRankKronDecomposed:
        return curvature.eigen

    @property
    def H_facs(self) -> LowRankKron | None:
        """Factors; ``None`` before a fit."""
        curvature = self.state.curvature
        return None if curvature is None else curvature.factors

    @H_facs.setter
    def H_facs(self, value: None) -> None:
        self.H = value

    @property
    def posterior_precision(self) -> LowRankKronDecomposed:
        """The posterior precision in its eigenbasis."""
        precision = self.fitted.laplace_precision
        assert isinstance(precision, LowRankKronDecomposed)
        return precision


class KronLoraLaplace(KronNames, KronLaplace):
    """Laplace posterior with low-rank Kronecker factors over all adapter weights.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"`` or another of `LoraLaplace`.
        factor_rank: Eigenpairs kept of a factor side longer than ``low_rank_threshold``; ``None``
            keeps every side dense.
        low_rank_threshold: Sides up to this length stay dense.
        residual: ``"isotropic"`` keeps a low-rank side's trace exact, ``"zero"`` drops what the
            kept eigenpairs miss.
        eigenvalue_correction: Keep the factors' eigenvectors, but take as eigenvalues the exact
            curvature's diagonal in their basis, correlations between tokens included: a second
            pass over the data, see `CorrectedKron`. It is never farther from the exact blocks.
            Source: George et al. (2018), arXiv:1806.03884.
        **kwargs: Arguments of `LoraLaplace`.

    Raises:
        ValueError: If an argument is out of range, and as `LoraLaplace`.
    """

    _key = ("lora", "kron")

    def __init__(
        self,
        model: nn.Module,
        likelihood: str,
        *,
        factor_rank: int | None = 64,
        low_rank_threshold: int = 512,
        residual: str = "isotropic",
        eigenvalue_correction: bool = False,
        **kwargs: Any,
    ) -> None:
        spec = FactorSpec(factor_rank, low_rank_threshold, residual)
        super().__init__(model, likelihood, Kron(spec, eigenvalue_correction), **kwargs)


class DiagLoraLaplace(LoraLaplace, DiagLaplace):
    """Laplace posterior with a diagonal precision over all adapter weights.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"`` or another of `LoraLaplace`.
        **kwargs: Arguments of `LoraLaplace`.
    """

    _key = ("lora", "diag")

    def __init__(self, model: nn.Module, likelihood: str, **kwargs: Any) -> None:
        super().__init__(model, likelihood, Diagonal(), **kwargs)
