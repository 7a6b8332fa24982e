"""The prior precision, and the noise, that maximise the evidence with its gradient term.

See `RowTerm` and `Subspace` for the term. The scalar's evidence is looked at over the whole range,
since it may have several maxima; groups and noise climb from the best scalar. The range is wider
where the curvature of a regression, which depends on the targets' unit, is very large or small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from scipy.optimize import brentq, minimize
from torch import Tensor

from laplace_lora.structures.posterior import Posterior
from laplace_lora.tuning.evidence.curves import EvidenceCurve, evidence_curve
from laplace_lora.tuning.minima import continued, refined

PLATEAU = 0.01  # nats that do not count
OUTSIDE = 1e30  # in the place of what is not credible; line searches take no infinity
HIGHEST = 1e10  # prior precision
LOW, HIGH, STEP = math.log(1e-6), math.log(HIGHEST), 0.5  # of log δ
# Parts of a regression's curvature: beyond, weights are all free, or the evidence is flat.
WEAKEST, STRONGEST = 1e-8, 1e3
EXTREME = 1e30  # precisions beyond are none in float32
NOT_CREDIBLE = (
    "the evidence has no maximum where it is credible: as the prior weakens it rises to 0 nats, a "
    "probability of one for all labels, since the quadratic expansion does not hold there. {}; "
    "method='loo' (of tokens 'widest'), or la.calibrate on labels, does not depend on it"
)
NOISE_RANGE = 6 * math.log(10)  # either way, of log σ


Limits = tuple[float, float]  # of log δ


class Maximum(NamedTuple):
    """Where an evidence is largest, as far as it is credible.

    Attributes:
        precisions: Prior precision of each group, float64.
        noise: Standard deviation of a regression's observation noise.
        objection: Why it is no maximum; empty where it is one.
    """

    precisions: Tensor
    noise: float
    objection: str = ""


def corrected_precision(posterior: Posterior, groups: Tensor, tune_noise: bool = False) -> Maximum:
    """Return the maximum of the corrected evidence over one prior precision per group.

    A classifier's evidence above zero would mean labels with a probability above one: there the
    quadratic expansion does not hold, and such precisions are left out.

    Args:
        posterior: A fitted posterior whose gradient term is known, with a scalar prior. Its noise
            is where the search starts.
        groups: Group of each tensor, ``(tensors,)``.
        tune_noise: Whether to choose a regression's noise as well.

    Raises:
        FloatingPointError: If the evidence is nowhere credible.
    """
    count = int(groups.max()) + 1
    noise = posterior.settings.sigma_noise.detach().double().cpu()
    bound = 0.0 if posterior.objective.is_classifier else math.inf
    scalar_evidence = evidence_curve(posterior, torch.zeros_like(groups))
    (whole,) = search_limits(posterior, scalar_evidence, noise.log())
    scalar, is_inside, objection = _best_scalar(scalar_evidence, noise.log(), bound, whole)
    start = torch.full((count,), scalar, dtype=torch.float64)
    if (count == 1 or not is_inside) and not tune_noise:
        return Maximum(start.exp(), float(noise), objection)
    evidence = scalar_evidence if count == 1 else evidence_curve(posterior, groups)
    # Below, the rounding of loss / σ² is no plateau any more, and would be climbed.
    loss = float(posterior.state.loss) / posterior.temperature
    rounded = loss * torch.finfo(posterior.dtype).eps / PLATEAU
    lowest = 0.5 * math.log(rounded) if rounded > 0 else -math.inf
    limits = search_limits(posterior, evidence, noise.log())
    return uphill(evidence, start, noise.log(), bound, tune_noise, limits, lowest)


def search_limits(posterior: Posterior, evidence: EvidenceCurve, log_noise: Tensor) -> list[Limits]:
    """Return the range in which each group's log precision is sought.

    Args:
        posterior: Whose evidence it is.
        evidence: Of some groups.
        log_noise: Log of the observation noise where the search starts.
    """
    traces, limits = evidence.traces(log_noise), []
    rounding = torch.finfo(traces.dtype).eps * float(traces.sum())
    for trace in traces.tolist():
        points = [LOW, HIGH]
        if posterior.objective.has_noise and trace > rounding:
            low, high = max(WEAKEST * trace, 1 / EXTREME), min(STRONGEST * trace, EXTREME)
            points = continued(points, STEP, math.log(low), math.log(high))
        limits.append((points[0], points[-1]))
    return limits


def _best_scalar(
    evidence: EvidenceCurve, log_noise: Tensor, bound: float, limits: Limits
) -> tuple[float, bool, str]:
    """Return the best log precision, whether it is inside of the range, and what is against it."""

    def descent(log_delta: float) -> float:
        value = evidence(torch.tensor([log_delta], dtype=torch.float64), log_noise)
        return -float(value) if value <= bound else OUTSIDE

    usual = torch.arange(LOW, HIGH, STEP, dtype=torch.float64).tolist()
    points = continued(usual, STEP, limits[0], limits[1] - STEP)
    values = [descent(point) for point in points]
    best = min(range(len(points)), key=values.__getitem__)
    if values[best] >= OUTSIDE:
        raise FloatingPointError("the evidence is above zero for every prior precision")
    beside = values[max(best - 1, 0)], values[min(best + 1, len(values) - 1)]
    if values[-1] - values[best] <= PLATEAU:
        # Flat up to an infinitely strong prior: the data ask for no width. The weakest of the
        # priors that are as good keeps the numbers finite.
        weakest = next(i for i, value in enumerate(values) if value - values[best] <= PLATEAU)
        return points[weakest], False, ""
    low, high = points[max(best - 1, 0)], points[min(best + 1, len(points) - 1)]
    if _slope(evidence, low, log_noise) > 0 > _slope(evidence, high, log_noise):
        root = brentq(lambda point: _slope(evidence, point, log_noise), low, high, xtol=1e-10)
        if descent(root) <= values[best]:
            return root, True, ""
    best_near = refined(descent, points, values, 1e-6)  # at a border, or near another maximum
    if OUTSIDE in beside:
        return best_near, False, NOT_CREDIBLE.format("The border is taken")
    return best_near, True, ""


def _slope(evidence: EvidenceCurve, log_delta: float, log_noise: Tensor) -> float:
    """Return the evidence's exact derivative in the log precision."""
    variable = torch.tensor([log_delta], dtype=torch.float64, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(evidence(variable, log_noise), variable)
    return float(slope)


def uphill(
    evidence: EvidenceCurve,
    start: Tensor,
    log_noise: Tensor,
    bound: float,
    tune_noise: bool,
    limits: Sequence[Limits],
    lowest: float = -math.inf,
) -> Maximum:
    """Return the maximum uphill of a start, or the start if that is better.

    Args:
        evidence: Of some groups.
        start: Log precision of each, ``(groups,)``.
        log_noise: Log of the observation noise, where the search starts.
        bound: Above which an evidence is not credible.
        tune_noise: Whether to choose the noise as well.
        limits: Of each group, see `search_limits`; where the usual ones hold it back.
        lowest: Log of the smallest noise that is tried.
    """
    count, kept = len(start), Maximum(start.exp(), math.exp(log_noise))

    def split(point: Tensor) -> tuple[Tensor, Tensor]:
        return point[:count], point[count] if tune_noise else log_noise

    def descent(point: Any) -> tuple[float, Any]:
        variable = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            value = -evidence(*split(variable))
        (slope,) = torch.autograd.grad(value, variable)
        return float(value.detach()), slope.tolist()

    first = torch.cat([start, log_noise.reshape(1)])[: count + tune_noise]
    low = min(max(float(log_noise) - NOISE_RANGE, lowest), float(log_noise))
    of_noise = [(low, float(log_noise) + NOISE_RANGE)] * tune_noise

    def climb(start: list[float], limits: Sequence[Limits]) -> Any:
        return minimize(
            descent,
            start,
            jac=True,
            bounds=[*limits, *of_noise],
            method="L-BFGS-B",
            options={"ftol": 1e-13, "gtol": 1e-7, "maxiter": 500},
        )

    usual = [(LOW, HIGH)] * count
    found = climb(first.tolist(), usual)
    ends = zip(found.x[:count], limits, strict=True)
    if any(low < log <= LOW or HIGH <= log < high for log, (low, high) in ends):
        found = climb(found.x.tolist(), limits)
    if -found.fun > bound:
        shared = NOT_CREDIBLE.format("All tensors get the best precision that they can share")
        return kept._replace(objection=shared)
    if found.fun > descent(first.tolist())[0]:
        return kept
    logs, log_sigma = split(torch.tensor(found.x, dtype=torch.float64))
    return Maximum(logs.exp(), math.exp(log_sigma))
