"""The log evidence, with its gradient term, as a function of prior precisions and noise.

Where the curvature is a block per tensor, eigenvalues are all it takes; where data couple the
tensors, as in an exact posterior, the Gram matrix of each group's rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from laplace_lora.linalg.cholesky import shifted_cholesky
from laplace_lora.linalg.row_grams import group_grams
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.structures.base import Spectrum
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.row_term import RowTerm
from laplace_lora.tuning.evidence.optimum import effective_parameters


class EvidenceCurve(ABC):
    """The log evidence of a posterior, whatever prior and noise it has itself.

    Args:
        posterior: A fitted posterior; where its gradient term is not known, it is left out.
        groups: Group of each tensor, ``(tensors,)``.
    """

    def __init__(self, posterior: Posterior, groups: Tensor) -> None:
        state = posterior.state
        self._loss = state.loss
        self._observations = state.n_data * state.n_outputs if posterior.objective.has_noise else 0
        self._inverse_temperature = 1 / posterior.temperature
        self._noise = float(posterior.settings.sigma_noise.detach())
        self._gain = posterior.gradient_term
        self._squares = state.squared_norms
        self._groups = groups.to(self._squares.device)

    def __call__(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return the log evidence in nats, up to ``log 2π`` for each observation of a regression.

        Args:
            logs: Log prior precisions, ``(groups,)`` float64; gradients flow through them.
            log_noise: Log of the observation noise, a scalar; without effect for a classifier.
        """
        scale = self._scale(log_noise)
        log_likelihood = -scale * self._loss - self._observations * log_noise
        return self._relative(logs.exp(), scale).to(logs) + log_likelihood

    @abstractmethod
    def effective(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return how many directions of each group the data determine, ``(groups,)``, float64."""

    @abstractmethod
    def traces(self, log_noise: Tensor) -> Tensor:
        """Return the trace of each group's curvature under a noise, ``(groups,)``, float64."""

    @abstractmethod
    def _relative(self, deltas: Tensor, scale: Tensor) -> Tensor:
        """Return the log evidence less the log likelihood, a float64 scalar."""

    def _scale(self, log_noise: Tensor) -> Tensor:
        """Return the factor of loss and curvature in the log joint."""
        if not self._observations:
            return log_noise.new_tensor(self._inverse_temperature / self._noise**2)
        return self._inverse_temperature * torch.exp(-2 * log_noise)


class SeparateEvidence(EvidenceCurve):
    """Of curvature with a block per tensor, or with one prior precision in all.

    A posterior whose structure couples the tensors must have a scalar prior.
    """

    def __init__(self, posterior: Posterior, groups: Tensor) -> None:
        super().__init__(posterior, groups)
        self._spectra = posterior.precision.spectra()
        if int(groups.max()) == 0:  # large models have hundreds of tensors
            self._spectra = [_joined(self._spectra)]
            self._squares, self._groups = self._squares.sum().reshape(1), self._groups[:1]

    def effective(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return how many directions of each group the data determine, see `EvidenceCurve`."""
        deltas = logs.exp().to(self._squares)
        spectra = self._spectra_at(self._scale(log_noise))
        shares = effective_parameters(spectra, deltas[self._groups])
        return torch.zeros_like(deltas).index_add_(0, self._groups, shares)

    def traces(self, log_noise: Tensor) -> Tensor:
        """Return the trace of each group's curvature, see `EvidenceCurve`."""
        zero = self._squares.new_zeros(())
        traces = [
            sum((times * e.double().sum() for e, times in spectrum), zero)
            for spectrum in self._spectra_at(self._scale(log_noise))
        ]
        count = int(self._groups.max()) + 1
        return zero.new_zeros(count).index_add_(0, self._groups, torch.stack(traces))

    def _relative(self, deltas: Tensor, scale: Tensor) -> Tensor:
        by_tensor = deltas.to(self._squares)[self._groups]
        log_det: Any = sum(
            (times * torch.log1p(e.double() / delta)).sum()
            for spectrum, delta in zip(self._spectra_at(scale), by_tensor, strict=True)
            for e, times in spectrum
        )
        if self._gain is None:
            return -0.5 * (log_det + (by_tensor * self._squares).sum())
        return -0.5 * log_det + self._gain.rise(by_tensor, scale)

    def _spectra_at(self, scale: Tensor) -> list[Spectrum]:
        """Return the eigenvalues under another scale."""
        here = self._scale(torch.as_tensor(self._noise).log().to(scale))
        ratio = (scale / here).to(self._squares.device)
        return [[(e * ratio, times) for e, times in part] for part in self._spectra]


class CoupledEvidence(EvidenceCurve):
    """Of curvature ``c Zᵀ Z`` that couples the tensors, by the Gram matrices ``K`` of the groups.

    With ``z = Z (θ − μ₀)``, the loss's gradient ``Zᵀ w`` and ``M = I + c Σ_g K_g/δ_g`` it is
    ``−½ [log det M + c (z − w)ᵀ M⁻¹ (z − w) − c ‖w‖²]`` above the log likelihood: that of a
    Gaussian process on the rows. Where rows do not see the gradient, the term is the bound of
    `Subspace`.
    """

    def __init__(self, posterior: Posterior, groups: Tensor) -> None:
        super().__init__(posterior, groups)
        precision = posterior.precision
        assert isinstance(precision, RowPrecision)
        ones = [torch.ones((), dtype=torch.float64)] * len(groups)
        self._grams = torch.stack(group_grams(precision.rows, ones, groups.tolist()))

    def effective(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return how many directions of each group the data determine, see `EvidenceCurve`."""
        weights = self._scale(log_noise).to(self._grams) / logs.exp().to(self._grams)
        curvature = torch.einsum("g,gnm->nm", weights, self._grams)
        core = shifted_cholesky(_identity(curvature) + curvature)
        return weights * torch.einsum("nm,gnm->g", torch.cholesky_inverse(core), self._grams)

    def traces(self, log_noise: Tensor) -> Tensor:
        """Return the trace of each group's curvature, see `EvidenceCurve`."""
        traces = self._grams.diagonal(dim1=1, dim2=2).sum(1)
        return self._scale(log_noise).to(traces) * traces

    def _relative(self, deltas: Tensor, scale: Tensor) -> Tensor:
        c, deltas = scale.to(self._grams), deltas.to(self._grams)
        curvature = c * torch.einsum("g,gnm->nm", 1 / deltas, self._grams)
        core = shifted_cholesky(_identity(curvature) + curvature)
        relative = -core.diagonal().log().sum()
        by_tensor = deltas.to(self._squares)[self._groups]
        if isinstance(self._gain, RowTerm):
            gap, square = self._gain.misfit
            whitened = torch.linalg.solve_triangular(core, gap.to(core).unsqueeze(1), upper=False)
            return relative + 0.5 * c * (square.to(core) - whitened.square().sum())
        if self._gain is None:
            return relative - 0.5 * (by_tensor * self._squares).sum().to(core)
        return relative + self._gain.rise(by_tensor, scale).to(core)


def couples(posterior: Posterior, groups: Tensor) -> bool:
    """Return whether the data couple groups of tensors, whose priors cannot be tuned apart then."""
    return posterior.structure.couples_groups and int(groups.max()) > 0


def evidence_curve(posterior: Posterior, groups: Tensor) -> EvidenceCurve:
    """Return the evidence of a posterior with a scalar prior, as a function of the groups'."""
    return (CoupledEvidence if couples(posterior, groups) else SeparateEvidence)(posterior, groups)


def _joined(spectra: list[Spectrum]) -> Spectrum:
    """Return the eigenvalues of several tensors as those of one."""
    found: dict[int, list[Tensor]] = {}
    for spectrum in spectra:
        for e, times in spectrum:
            found.setdefault(times, []).append(e.double().flatten())
    return [(torch.cat(parts), times) for times, parts in found.items()]


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
