"""Prior and noise at the maximum of the marginal likelihood, from eigenvalues alone."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from laplace_lora.display.warning import warn
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.structures.state import PosteriorState
from laplace_lora.tuning.evidence.corrected import (
    Maximum,
    corrected_precision,
    search_limits,
    uphill,
)
from laplace_lora.tuning.evidence.curves import couples, evidence_curve
from laplace_lora.tuning.evidence.optimum import optimal_noise, optimal_precision


def maximise(posterior: Posterior, groups: Tensor, tune_noise: bool, correction: bool) -> Settings:
    """Return the settings at which the log marginal likelihood is largest.

    Args:
        posterior: A fitted posterior.
        groups: Group of each trainable tensor, ``(tensors,)``.
        tune_noise: Whether to choose the observation noise as well.
        correction: Whether to take the gradient term in, where it is known.

    Warns:
        UserWarning: If the evidence has no maximum where it is credible.
    """
    if correction and posterior.gradient_term is not None:
        start = with_first_precision(posterior)
        if tune_noise:  # the search starts where the plain evidence is largest
            start = start.with_settings(_separate(start, torch.zeros_like(groups), True))
        best = corrected_precision(start, groups, tune_noise)
        if best.objection:
            warn(best.objection)
    elif couples(posterior, groups):
        best = _joint(posterior, groups, tune_noise)
    else:
        return _separate(with_first_precision(posterior), groups, tune_noise)
    if tune_noise:
        posterior = with_noise(posterior, best.noise)
    return with_precisions(posterior, best.precisions[groups.cpu()], groups)


def with_term(posterior: Posterior) -> Tensor:
    """Return the log evidence with its gradient term, a float64 scalar in nats; differentiable.

    Args:
        posterior: A fitted posterior whose gradient term is known, with one prior precision in all
            or per tensor.
    """
    term, state, settings = posterior.gradient_term, posterior.state, posterior.settings
    assert term is not None
    prior, scale = settings.prior_precision, posterior.scale.double()
    value = -scale * state.loss
    if posterior.objective.has_noise:
        deviation = settings.sigma_noise.double() * math.sqrt(2 * math.pi)
        value = value - state.n_data * state.n_outputs * deviation.log()
    log_det = posterior.structure.log_det_ratio(state.curvature, prior, posterior.scale)
    return value - 0.5 * log_det.to(value) + term.rise(prior, scale).to(value)


def scatter(state: PosteriorState) -> Tensor:
    """Return ``(θ − μ₀)ᵀ P₀ (θ − μ₀)`` of a fitted state, a float64 scalar."""
    prior = state.settings.prior_precision.double()
    if len(prior) in (1, len(state.sizes)):
        return (prior * state.squared_norms).sum()
    return (state.displacement.double().square() * prior).sum()


def with_first_precision(posterior: Posterior) -> Posterior:
    """Return the posterior with the first tensor's prior precision for all."""
    prior = posterior.settings.prior_precision[:1].detach()
    return posterior.with_settings(replace(posterior.settings, prior_precision=prior))


def with_precisions(posterior: Posterior, precisions: Tensor, groups: Tensor) -> Settings:
    """Return the settings with other prior precisions, a scalar where they are all one.

    Args:
        posterior: A fitted posterior.
        precisions: Prior precision of each tensor, ``(tensors,)``.
        groups: Group of each tensor.
    """
    is_scalar = int(groups.max()) == 0 and bool((precisions == precisions[0]).all())
    prior = (precisions[:1] if is_scalar else precisions).to(posterior.device, posterior.dtype)
    return replace(posterior.settings, prior_precision=prior)


def with_noise(posterior: Posterior, noise: float) -> Posterior:
    """Return the posterior with another observation noise."""
    sigma = torch.as_tensor(noise, device=posterior.device, dtype=posterior.dtype)
    return posterior.with_settings(replace(posterior.settings, sigma_noise=sigma))


def _separate(posterior: Posterior, groups: Tensor, tune_noise: bool) -> Settings:
    groups = groups.to(posterior.device)
    squares = posterior.state.squared_norms
    if tune_noise:
        state, sigma = posterior.state, posterior.settings.sigma_noise.detach()
        at_unit_noise = [
            [(e * sigma.square(), times) for e, times in spectrum]
            for spectrum in posterior.precision.spectra()
        ]
        noise = optimal_noise(
            lambda noise: [[(e / noise**2, n) for e, n in s] for s in at_unit_noise],
            squares,
            groups,
            state.loss / posterior.temperature,
            state.n_data * state.n_outputs,
            float(sigma),
        )
        posterior = with_noise(posterior, noise)
    spectra = posterior.precision.spectra()
    return with_precisions(posterior, optimal_precision(spectra, squares, groups)[groups], groups)


def _joint(posterior: Posterior, groups: Tensor, tune_noise: bool) -> Maximum:
    """Climb from the best scalar."""
    scalar = with_first_precision(posterior).without_gradient_term()
    best = _separate(scalar, torch.zeros_like(groups), tune_noise=False)
    start = best.prior_precision.double().cpu().log().expand(int(groups.max()) + 1)
    evidence = evidence_curve(scalar, groups)
    log_noise = best.sigma_noise.detach().double().cpu().log()
    limits = search_limits(posterior, evidence, log_noise)
    return uphill(evidence, start, log_noise, math.inf, tune_noise, limits)
