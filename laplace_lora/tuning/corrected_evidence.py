"""The prior precision that maximises the evidence with its gradient term.

See `RowTerm` and `Subspace` for the term. The scalar's evidence is looked at over the whole range,
since it may have several maxima; groups climb from the best scalar.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from scipy.optimize import minimize
from torch import Tensor

from laplace_lora.structures.base import GradientTerm, Spectrum
from laplace_lora.structures.state import Posterior
from laplace_lora.tuning.line_search import refined

PLATEAU = 0.01  # nats that do not count
LOW, HIGH, STEP = math.log(1e-6), math.log(1e10), 0.5  # of log δ


def corrected_precision(posterior: Posterior, groups: Tensor) -> Tensor:
    """Return the maximum of the corrected evidence over one prior precision per group.

    A classifier's evidence above zero would mean labels with a probability above one: there the
    quadratic expansion does not hold, and such precisions are left out.

    Args:
        posterior: A fitted posterior whose gradient term is known.
        groups: Group of each tensor, ``(tensors,)``.

    Returns:
        Float64 precisions, ``(groups,)``.

    Raises:
        FloatingPointError: If the evidence is nowhere credible.
    """
    gain = posterior.gradient_term
    assert gain is not None
    spectra, squares = posterior.precision.spectra(), posterior.state.squared_norms
    scale, groups = float(posterior.scale.detach()), groups.to(squares.device)
    loss = scale * posterior.state.loss
    count = int(groups.max()) + 1
    bound = 0.0 if posterior.objective.is_classifier else math.inf

    def evidence(logs: Tensor) -> Tensor:
        deltas = logs.to(squares).exp()
        return relative_evidence(deltas, groups, spectra, squares, gain, scale) - loss

    def descent(log_delta: float) -> float:
        value = evidence(torch.full((count,), log_delta, dtype=torch.float64))
        return -float(value) if value <= bound else math.inf

    points = torch.arange(LOW, HIGH, STEP, dtype=torch.float64).tolist()
    values = [descent(point) for point in points]
    best = min(range(len(points)), key=values.__getitem__)
    if not math.isfinite(values[best]):
        raise FloatingPointError("the evidence is above zero for every prior precision")
    if values[-1] - values[best] <= PLATEAU:
        # Flat up to an infinitely strong prior: the data ask for no width. The weakest of the
        # priors that are as good keeps the numbers finite.
        best = next(i for i, value in enumerate(values) if value - values[best] <= PLATEAU)
        return torch.full((count,), math.exp(points[best]), dtype=torch.float64)
    scalar = refined(descent, points, values, 1e-6)
    if count == 1:
        return torch.tensor([math.exp(scalar)], dtype=torch.float64)

    def gradient(point: Any) -> tuple[float, Any]:
        logs = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            value = -evidence(logs)
        (slope,) = torch.autograd.grad(value, logs)
        return float(value.detach()), slope.tolist()

    bounds = [(LOW, HIGH)] * count
    climbed = minimize(gradient, [scalar] * count, jac=True, bounds=bounds, method="L-BFGS-B")
    if -climbed.fun > bound or climbed.fun > descent(scalar):
        return torch.full((count,), math.exp(scalar), dtype=torch.float64)
    return torch.tensor(climbed.x, dtype=torch.float64).exp()


def relative_evidence(
    precisions: Tensor,
    groups: Tensor,
    spectra: list[Spectrum],
    squares: Tensor,
    gain: GradientTerm | None,
    scale: float,
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
    value: Tensor = -0.5 * (log_det + (deltas * squares).sum())
    if gain is None:
        return value
    return value + gain.term(precisions if len(precisions) == 1 else deltas, scale)
