"""`KronLoraLaplace` and `DiagLoraLaplace`: Laplace posteriors over adapter weights.

A Gaussian around the trained adapter with a Kronecker-factored or diagonal precision. Fitting
belongs to `fitting`, predictions to `predictive`, curvature to `curvature`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from laplace import DiagLaplace, KronLaplace
from torch import Tensor, nn

from laplace_lora.fitting.passes import Pass, Sums
from laplace_lora.linalg.kron import LowRankKron
from laplace_lora.linalg.kron_eigen import LowRankKronDecomposed
from laplace_lora.linalg.packing import diagonal_blocks, pack_kron, unpack_kron
from laplace_lora.posteriors.base import LoraPosterior
from laplace_lora.predictive.glm import Gram
from laplace_lora.structures.eigenvalue_correction import CorrectedKron
from laplace_lora.structures.sizes import kron_size, table_size

OWN = ("factor_rank", "low_rank_threshold", "residual")  # backend arguments that are the class's


class KronLoraLaplace(LoraPosterior, KronLaplace):
    """Laplace posterior with low-rank Kronecker factors over all adapter weights.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"``, ``"reward_modeling"`` or
            ``"language_modeling"``, see `LoraPosterior`.
        factor_rank: Eigenpairs kept of a factor side longer than ``low_rank_threshold``; ``None``
            keeps every side dense.
        low_rank_threshold: Sides up to this length stay dense.
        residual: ``"isotropic"`` keeps a low-rank side's trace exact, ``"zero"`` drops what the
            kept eigenpairs miss.
        eigenvalue_correction: Keep the factors' eigenvectors, but take as eigenvalues the exact
            curvature's diagonal in their basis, correlations between tokens included: a second
            pass over the data, see `CorrectedKron`. It is never farther from the exact blocks.
            Source: George et al. (2018), arXiv:1806.03884.
        **kwargs: Arguments of `LoraPosterior`.

    Raises:
        ValueError: If an argument is out of range, and as `LoraPosterior`.
    """

    _key = ("lora", "kron")
    H: Any
    H_facs: LowRankKron

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
        self.eigenvalue_correction = eigenvalue_correction
        if kwargs.get("damping"):
            raise ValueError("damping is not supported: it would have no effect on the posterior")
        own = dict(zip(OWN, (factor_rank, low_rank_threshold, residual), strict=True))
        kwargs["backend_kwargs"] = {**(kwargs.get("backend_kwargs") or {}), **own}
        super().__init__(model, likelihood, **kwargs)

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P − log det P₀`` of the evidence, a float64 scalar."""
        self._check_H_init()
        return self.posterior_precision.log_det_ratio()

    def block_covariance(self) -> Callable[[int, Tensor], Tensor]:
        """Return the function that gives each tensor's part of the predictive covariance."""
        return self.posterior_precision.inverse_form

    def block_grams(self) -> Callable[[int, Tensor], list[Gram]]:
        """Return the function that gives each tensor's part as a function of the prior."""
        return (self.H * self._H_factor).grams

    def block_spectra(self) -> list[list[tuple[Tensor, int]]]:
        """Return each tensor's curvature eigenvalues, with how often each counts."""
        self._check_H_init()
        scaled = self.H * self._H_factor
        return [list(scaled.spectrum(i)) for i in range(len(scaled))]

    def curvature_size(self) -> int:
        """Return how many numbers the factors and their eigenpairs hold, none of them shared."""
        maps = self.backend.maps
        sides = [[m.in_features, m.out_features] for m in maps if not m.is_diagonal]
        diagonal = sum(linear.out_features for linear in maps if linear.is_diagonal)
        options = self.backend.factor_rank, self.backend.low_rank_threshold
        tables = table_size(self._block_sides(), *options) if self.eigenvalue_correction else 0
        return diagonal + kron_size(sides, *options) + tables

    @property
    def fits_by_jacobians(self) -> bool:
        """Whether a fit puts together each tensor's Jacobian: to correct eigenvalues."""
        return self.eigenvalue_correction

    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``."""
        return self.posterior_precision.diag(-1)

    def _init_H(self) -> None:
        self.H = LowRankKron([], self._backend_kwargs["residual"])

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        return self.backend.accumulate(x, y, state)

    def arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments, but for model and backend."""
        arguments = super().arguments()
        options = arguments["backend_kwargs"]
        own = {name: options.pop(name) for name in OWN}
        return {**arguments, **own, "eigenvalue_correction": self.eigenvalue_correction}

    def state_dict(self) -> dict[str, Any]:
        """Return laplace-torch's state, with what a calibration chose and corrected eigenvalues."""
        return {**super().state_dict(), "H_corrected": self.H if self.H.tables else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a posterior of the same class and arguments, at its weights.

        Raises:
            ValueError: If one's eigenvalues are corrected, the other's are not.
        """
        corrected: LowRankKronDecomposed | None = state_dict.get("H_corrected")
        if (corrected is not None) != self.eigenvalue_correction:
            raise ValueError("the state is of another eigenvalue_correction than this posterior's")
        super().load_state_dict(state_dict)
        self.H = self.H if corrected is None else corrected

    def _packed(self) -> tuple[dict[str, Tensor], Any]:
        return pack_kron(self.H_facs, self.H)

    def _unpack(self, tensors: Mapping[str, Tensor], description: Any) -> None:
        backend = self.backend
        if backend.uncovered == "diag":
            # Which maps Kronecker factors cannot express showed when the posterior was fitted.
            diagonal = diagonal_blocks(tensors, description)
            shown = [b.map for i, b in enumerate(backend.blocks) if i in diagonal]
            backend.cover_whole([i for i in shown if not backend.maps[i].is_diagonal])
        self.H_facs, self.H = unpack_kron(
            tensors,
            description,
            self._block_sides(),
            [backend.maps[block.map].is_diagonal for block in backend.blocks],
            backend.factor_rank,
            backend.residual,
            self.eigenvalue_correction,
        )

    def _block_sides(self) -> list[list[int]]:
        maps = self.backend.maps
        return [maps[block.map].sides(block.parameter) for block in self.backend.blocks]

    @property
    def curvature(self) -> LowRankKron | CorrectedKron:
        """Kronecker factors of the summed loss's curvature, with corrected eigenvalues if any."""
        self._check_H_init()
        return CorrectedKron(self.H_facs, self.H) if self.eigenvalue_correction else self.H_facs

    def _tensors(self, state: Any) -> list[Tensor]:
        return state.tensors()

    def _assembled(self, state: Any, n: int) -> LowRankKron | CorrectedKron:
        factors = self.backend.assemble(state, n)
        return CorrectedKron(factors) if self.eigenvalue_correction else factors

    def _joined(self, curvature: Any, n: int, other: Any, m: int) -> LowRankKron | CorrectedKron:
        return curvature.joined(n, other, m)

    def _refined(self, curvature: Any, n: int, summed: Callable[[Pass], Sums]) -> Any:
        return (
            curvature.refined(self.backend, n, summed) if self.eigenvalue_correction else curvature
        )

    def _install(self, curvature: LowRankKron | CorrectedKron) -> None:
        factors, decomposed = curvature.decomposition()
        if (decomposed.tables is not None) != self.eigenvalue_correction:
            raise ValueError(
                "a curvature must be a CorrectedKron if, and only if, eigenvalue_correction is set"
            )
        self.H_facs, self.H = factors, decomposed


class DiagLoraLaplace(LoraPosterior, DiagLaplace):
    """Laplace posterior with a diagonal precision over all adapter weights.

    Args:
        model: A `PeftModel`, or a `LogitsModel` around one.
        likelihood: ``"classification"``, ``"regression"``, ``"reward_modeling"`` or
            ``"language_modeling"``, see `LoraPosterior`.
        **kwargs: Arguments of `LoraPosterior`.
    """

    _key = ("lora", "diag")
    H: Any

    @property
    def log_det_ratio(self) -> Tensor:
        """``log det P − log det P₀`` of the evidence, a float64 scalar."""
        self._check_H_init()
        return torch.log1p((self._H_factor * self.H / self.prior_precision_diag).double()).sum()

    def block_covariance(self) -> Callable[[int, Tensor], Tensor]:
        """Return the function that gives each tensor's part of the predictive covariance."""
        sizes = [parameter.numel() for parameter in self.params]
        variances = self.posterior_variance.split(sizes)

        def part(i: int, jacobian: Tensor) -> Tensor:
            rows = jacobian.flatten(2)
            return (rows * variances[i]) @ rows.mT

        return part

    def block_grams(self) -> Callable[[int, Tensor], list[Gram]]:
        """Return the function that gives each tensor's part as a function of the prior."""
        curvature = [values for ((values, _),) in self.block_spectra()]

        def grams(i: int, jacobian: Tensor) -> list[Gram]:
            rows = jacobian.flatten(2)
            return [(curvature[i], rows.unsqueeze(2) * rows.unsqueeze(1))]

        return grams

    def block_spectra(self) -> list[list[tuple[Tensor, int]]]:
        """Return each tensor's curvature eigenvalues, with how often each counts."""
        self._check_H_init()
        sizes = [parameter.numel() for parameter in self.params]
        return [[(values, 1)] for values in (self._H_factor * self.H).split(sizes)]

    def weight_variance(self) -> Tensor:
        """Return the diagonal of the posterior covariance, ``(parameters,)``."""
        return self.posterior_variance

    def _init_H(self) -> None:
        self.H = None

    def _add(self, state: Any, x: Any, y: Tensor) -> tuple[Tensor, Any]:
        loss, diagonal = self.backend.diag(x, y)
        return loss, diagonal if state is None else state + diagonal

    def _install(self, curvature: Tensor) -> None:
        if not bool(curvature.isfinite().all()):
            raise FloatingPointError("the diagonal curvature is not finite")
        self.H = curvature
