"""The log evidence, with its gradient term, as a function of prior precisions and noise.

Where the curvature is a block per tensor, eigenvalues are all it takes; where data couple the
tensors, as in an exact posterior, the Gram matrix of each group's rows.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from laplace_lora.linalg.cholesky import shifted_cholesky
from laplace_lora.linalg.row_grams import group_grams
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.structures.base import GradientTerm, Spectrum
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.row_term import RowTerm
from laplace_lora.tuning.evidence.optimum import effective_parameters


class EvidenceCurve(Protocol):
    """The log evidence of a posterior, whatever prior and noise it has itself."""

    def __call__(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return the log evidence in nats, up to ``log 2π`` for each observation of a regression.

        Args:
            logs: Log prior precisions, ``(groups,)`` float64; gradients flow through them.
            log_noise: Log of the observation noise, a scalar; without effect for a classifier.
        """
        ...

    def effective(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return how many directions of each group the data determine, ``(groups,)``, float64."""
        ...

    def traces(self, log_noise: Tensor) -> Tensor:
        """Return the trace of each group's curvature under a noise, ``(groups,)``, float64."""
        ...


class _Likelihood:
    """Loss, its scale under any noise, and what the noise costs."""

    def __init__(self, posterior: Posterior) -> None:
        state = posterior.state
        self.loss = state.loss
        self.observations = state.n_data * state.n_outputs if posterior.objective.has_noise else 0
        self.inverse_temperature = 1 / posterior.temperature
        self.noise = float(posterior.settings.sigma_noise.detach())

    def scale(self, log_noise: Tensor) -> Tensor:
        """Return the factor of loss and curvature in the log joint."""
        if not self.observations:
            return log_noise.new_tensor(self.inverse_temperature / self.noise**2)
        return self.inverse_temperature * torch.exp(-2 * log_noise)

    def log_likelihood(self, log_noise: Tensor) -> Tensor:
        """Return the log likelihood at the weights."""
        return -self.scale(log_noise) * self.loss - self.observations * log_noise


class SeparateEvidence:
    """Of curvature with a block per tensor, or with one prior precision in all.

    Args:
        posterior: A fitted posterior, with a scalar prior where its structure couples the tensors;
            where its gradient term is not known, it is left out.
        groups: Group of each tensor, ``(tensors,)``.
    """

    def __init__(self, posterior: Posterior, groups: Tensor) -> None:
        self._likelihood = _Likelihood(posterior)
        self._spectra = posterior.precision.spectra()
        self._squares = posterior.state.squared_norms
        self._groups = groups.to(self._squares.device)
        self._gain = posterior.gradient_term
        if int(groups.max()) == 0:  # large models have hundreds of tensors
            self._spectra = [_joined(self._spectra)]
            self._squares, self._groups = self._squares.sum().reshape(1), self._groups[:1]

    def __call__(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return the log evidence, see `EvidenceCurve`."""
        scale, spectra = self._spectra_at(log_noise)
        deltas = logs.exp().to(self._squares)
        relative = relative_evidence(
            deltas, self._groups, spectra, self._squares, self._gain, scale
        )
        return relative.to(logs) + self._likelihood.log_likelihood(log_noise)

    def effective(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return how many directions of each group the data determine, see `EvidenceCurve`."""
        deltas = logs.exp().to(self._squares)
        shares = effective_parameters(self._spectra_at(log_noise)[1], deltas[self._groups])
        return torch.zeros_like(deltas).index_add_(0, self._groups, shares)

    def traces(self, log_noise: Tensor) -> Tensor:
        """Return the trace of each group's curvature, see `EvidenceCurve`."""
        zero = self._squares.new_zeros(())
        traces = [
            sum((times * e.double().sum() for e, times in spectrum), zero)
            for spectrum in self._spectra_at(log_noise)[1]
        ]
        count = int(self._groups.max()) + 1
        return zero.new_zeros(count).index_add_(0, self._groups, torch.stack(traces))

    def _spectra_at(self, log_noise: Tensor) -> tuple[Tensor, list[Spectrum]]:
        """Return scale and eigenvalues under a noise."""
        scale = self._likelihood.scale(log_noise)
        here = self._likelihood.scale(torch.as_tensor(self._likelihood.noise).log().to(log_noise))
        ratio = (scale / here).to(self._squares.device)
        return scale, [[(e * ratio, times) for e, times in part] for part in self._spectra]


class CoupledEvidence:
    """Of curvature ``c Zᵀ Z`` that couples the tensors, by the Gram matrices ``K`` of the groups.

    With ``z = Z (θ − μ₀)``, the loss's gradient ``Zᵀ w`` and ``M = I + c Σ_g K_g/δ_g`` it is
    ``−½ [log det M + c (z − w)ᵀ M⁻¹ (z − w) − c ‖w‖²]`` above the log likelihood: that of a
    Gaussian process on the rows. Where rows do not see the gradient, the term is the bound of
    `Subspace`.

    Args:
        posterior: A fitted posterior; where its gradient term is not known, it is left out.
        groups: Group of each tensor, ``(tensors,)``.
    """

    def __init__(self, posterior: Posterior, groups: Tensor) -> None:
        precision = posterior.precision
        assert isinstance(precision, RowPrecision)
        self._likelihood = _Likelihood(posterior)
        ones = [torch.ones((), dtype=torch.float64)] * len(groups)
        self._grams = torch.stack(group_grams(precision.rows, ones, groups.tolist()))
        self._gain = posterior.gradient_term
        squares = posterior.state.squared_norms
        self._groups = groups.to(squares.device)
        zeros = squares.new_zeros(len(self._grams))
        self._norms = zeros.index_add_(0, self._groups, squares)

    def __call__(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return the log evidence, see `EvidenceCurve`."""
        scale = self._likelihood.scale(log_noise)
        c, deltas = scale.to(self._grams), logs.exp().to(self._grams)
        curvature = c * torch.einsum("g,gnm->nm", 1 / deltas, self._grams)
        core = shifted_cholesky(_identity(curvature) + curvature)
        relative = -core.diagonal().log().sum()
        if isinstance(self._gain, RowTerm):
            gap, square = self._gain.misfit
            whitened = torch.linalg.solve_triangular(core, gap.to(core).unsqueeze(1), upper=False)
            relative = relative + 0.5 * c * (square.to(core) - whitened.square().sum())
        elif self._gain is None:
            relative = relative - 0.5 * (deltas.to(self._norms) * self._norms).sum().to(core)
        else:
            by_tensor = deltas.to(self._norms)[self._groups]
            relative = relative + self._gain.rise(by_tensor, scale).to(core)
        return relative.to(logs) + self._likelihood.log_likelihood(log_noise)

    def effective(self, logs: Tensor, log_noise: Tensor) -> Tensor:
        """Return how many directions of each group the data determine, see `EvidenceCurve`."""
        weights = self._likelihood.scale(log_noise).to(self._grams) / logs.exp().to(self._grams)
        curvature = torch.einsum("g,gnm->nm", weights, self._grams)
        core = shifted_cholesky(_identity(curvature) + curvature)
        return weights * torch.einsum("nm,gnm->g", torch.cholesky_inverse(core), self._grams)

    def traces(self, log_noise: Tensor) -> Tensor:
        """Return the trace of each group's curvature, see `EvidenceCurve`."""
        traces = self._grams.diagonal(dim1=1, dim2=2).sum(1)
        return self._likelihood.scale(log_noise).to(traces) * traces


def relative_evidence(
    precisions: Tensor,
    groups: Tensor,
    spectra: list[Spectrum],
    squares: Tensor,
    gain: GradientTerm | None,
    scale: float | Tensor,
) -> Tensor:
    """Return the log evidence less the log likelihood, a float64 scalar in nats.

    Args:
        precisions: One prior precision per group; gradients flow through them.
        groups: Group of each tensor.
        spectra: Curvature eigenvalues of each tensor, with how often each counts.
        squares: ``‖θ − μ₀‖²`` of each tensor.
        gain: The gradient term, if it is to be in.
        scale: Factor of loss and curvature in the log joint.
    """
    deltas = precisions[groups]
    log_det: Any = sum(
        (times * torch.log1p(e.double() / delta)).sum()
        for spectrum, delta in zip(spectra, deltas, strict=True)
        for e, times in spectrum
    )
    if gain is None:
        return -0.5 * (log_det + (deltas * squares).sum())
    return -0.5 * log_det + gain.rise(precisions if len(precisions) == 1 else deltas, scale)


def _joined(spectra: list[Spectrum]) -> Spectrum:
    """Return the eigenvalues of several tensors as those of one."""
    found: dict[int, list[Tensor]] = {}
    for spectrum in spectra:
        for e, times in spectrum:
            found.setdefault(times, []).append(e.double().flatten())
    return [(torch.cat(parts), times) for times, parts in found.items()]


def _identity(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
