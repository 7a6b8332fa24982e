"""A model linearised in its weights, in the space of its training examples.

With Gaussian weights, ``N`` examples of ``c`` functions each are an ``N c``-dimensional Gaussian
with covariance ``J Jᵀ / δ``: its mode, and what each example would have been predicted to be had it
been left out, need no more than that matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import brentq
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.inapplicable import InapplicableError
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.tuning.minima import newton_descent

STEPS = 100
DECADES = (8, -10)  # of precisions tried, around the Gram matrix's mean diagonal
BEYOND = (5, -8)  # of them at least beyond the curvature, which the unit of the targets shifts

Loss = Callable[[Tensor], float]  # of functions (N, c)


@dataclass(frozen=True)
class Mode:
    """The most probable functions of a linear model.

    Attributes:
        precision: Prior precision ``δ`` of the weights.
        coefficients: ``α`` with weights ``μ₀ + Jᵀ α / δ``, ``(N, c)``; of a `SpannedModel` those
            of its directions.
        outputs: The functions, ``(N, c)``.
        nll: Their summed negative log likelihood, in nats.
    """

    precision: float
    coefficients: Tensor
    outputs: Tensor
    nll: float


@dataclass(frozen=True)
class LinearModel:
    """Functions ``f = f₀ + J (θ − μ₀)`` of examples, with ``θ ~ N(μ₀, I / δ)``.

    Attributes:
        gram: ``J Jᵀ`` of all functions, float64, ``(N c, N c)``.
        offset: The functions at the prior mean, ``(N, c)``.
        labels: Of the examples.
        likelihood: Of the functions.
        relative: Whether they are contrasts to a first class, which stands at zero.
        scale: Factor of the log likelihood, ``1 / σ²`` for a regression, over the temperature.
    """

    gram: Tensor
    offset: Tensor
    labels: Tensor
    likelihood: Likelihood
    relative: bool
    scale: float = 1.0

    def nll(self, outputs: Tensor) -> float:
        """Return the summed negative log likelihood of functions ``(N, c)``, times the scale."""
        return self.scale * float(self.likelihood.nll(self._lift(outputs), self.labels))

    def mode(self, precision: float, start: Mode | None = None) -> Mode:
        """Return the mode, by iteratively reweighted least squares with halved steps.

        Args:
            precision: Prior precision of the weights.
            start: Where to start, such as the mode at another precision.
        """
        gram, flat = self.gram / precision, self.offset.flatten()
        if start is None:
            alpha = torch.zeros_like(flat)
        else:  # the same functions
            alpha = start.coefficients.flatten() * (precision / start.precision)

        def at(alpha: Tensor) -> tuple[Tensor, float, float]:
            shift = gram @ alpha
            outputs = (flat + shift).view_as(self.offset)
            nll = self.nll(outputs)
            return outputs, nll, nll + 0.5 * float(alpha @ shift)

        def step_from(alpha: Tensor, outputs: Tensor) -> Tensor:
            residual, root = self.residual(outputs), self.root(outputs)
            factor = self._factor(root, gram)
            curved = _apply(root.mT @ root, (outputs - self.offset).flatten()) - residual.flatten()
            inner = torch.cholesky_solve(_apply(root, gram @ curved).unsqueeze(1), factor)
            return curved - _apply(root.mT, inner.squeeze(1)) - alpha

        alpha, outputs, nll = newton_descent(alpha, at, step_from, STEPS)
        return Mode(precision, alpha.view_as(self.offset), outputs, nll)

    def fitted_like(self, nll: float, loss: Loss | None = None) -> Mode:
        """Return the mode at the precision at which the training loss has a given value.

        Args:
            nll: Summed negative log likelihood; where no precision reaches it, the nearest is
                taken.
            loss: From functions to what is to have this value, if it is not the model's own.

        Raises:
            InapplicableError: If no weight changes the functions.
        """
        unit = float(self.gram.diagonal().mean())
        if unit == 0:
            raise InapplicableError("no weight changes the outputs of the linearised base model")
        return along_path(self.mode, nll, unit, loss, self.scale)

    def leave_one_out(
        self, mode: Mode, companions: Mapping[int, Sequence[int]] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each example's prediction without it, from one factorisation.

        The cavity of a Laplace approximation (Vehtari, Mononen, Tolvanen, Sivula and Winther 2016,
        Bayesian leave-one-out cross-validation approximations for Gaussian latent variable models);
        for a Gaussian likelihood the exact moments.

        Args:
            mode: The model's mode.
            companions: Examples that are left out with others: by place, itself and those others.

        Returns:
            Mean ``(N, c)`` and covariance ``(N, c, c)`` of the functions.
        """
        n, c = self.offset.shape
        gram, root = self.gram / mode.precision, self.root(mode.outputs)
        rows = torch.linalg.solve_triangular(
            self._factor(root, gram), _apply(root, gram), upper=False
        ).view(n * c, n, c)
        diagonal = gram.view(n, c, n, c).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        marginal = diagonal - torch.einsum("knc,knd->ncd", rows, rows)
        cavity = without_own(marginal, root)
        residual = self.residual(mode.outputs).unsqueeze(-1)
        mean = mode.outputs + (cavity @ residual).squeeze(-1)
        for members, owners in owners_of_sets(companions or {}).items():
            s = len(members)
            of = torch.tensor(members, device=gram.device)
            functions = (of.unsqueeze(-1) * c + torch.arange(c, device=gram.device)).flatten()
            columns = rows.view(n * c, n * c)[:, functions]
            marginal = gram[functions][:, functions] - columns.T @ columns
            joint = without_own(marginal[None], torch.block_diag(*root[of])[None])[0]
            step = (joint @ residual[of].flatten()).view(s, c)
            for owner in owners:
                at = members.index(owner)
                mean[owner] = mode.outputs[owner] + step[at]
                cavity[owner] = joint.view(s, c, s, c)[at, :, at]
        return mean, cavity

    def root(self, outputs: Tensor) -> Tensor:
        """Return roots ``R`` of the examples' curvatures ``Rᵀ R``, ``(N, k, c)``."""
        root = self.likelihood.root(self._lift(outputs), self.labels)
        return math.sqrt(self.scale) * root.transpose(0, 1)[:, :, int(self.relative) :]

    def curved(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Return the products of the examples' curvatures with rows, ``(N, c, m)``.

        Nothing of the size of a root is formed.
        """

        def product(along: Tensor) -> Tensor:
            result: Tensor = torch.func.jvp(self.residual, (outputs,), (along,))[1]
            return result

        products: Tensor = torch.vmap(product, -1, -1)(rows)
        return products

    def _lift(self, outputs: Tensor) -> Tensor:
        return F.pad(outputs, (1, 0)) if self.relative else outputs

    def residual(self, outputs: Tensor) -> Tensor:
        """Return the derivative of the negative log likelihood, ``(N, c)``."""
        residual = self.likelihood.residual(self._lift(outputs), self.labels)[0]
        return self.scale * residual[:, int(self.relative) :]

    def _factor(self, root: Tensor, gram: Tensor) -> Tensor:
        inner = _apply(root, _apply(root, gram).T)
        inner.diagonal().add_(1)
        return torch.linalg.cholesky(inner)


def along_path(
    mode_at: Callable[..., Mode], nll: float, unit: float, loss: Loss | None, scale: float = 1.0
) -> Mode:
    """Return the mode at the precision at which the training loss has a given value.

    Args:
        mode_at: From a precision, and a mode to start from, to the mode.
        nll: Summed negative log likelihood; the nearest is taken where no precision reaches it.
        unit: A precision of the curvature's size, but for the scale.
        loss: From functions to the training loss, if it is not the negative log likelihood.
        scale: Factor of the log likelihood.
    """

    def loss_of(mode: Mode) -> float:
        return mode.nll if loss is None else loss(mode.outputs)

    shift = math.log10(scale)
    high = unit * 10.0 ** max(DECADES[0], math.ceil(shift) + BEYOND[0])
    low = unit * 10.0 ** min(DECADES[1], math.floor(shift) + BEYOND[1])
    mode = mode_at(high)
    if loss_of(mode) <= nll:
        return mode
    while loss_of(mode) > nll and mode.precision / 10 >= low:
        mode, above = mode_at(mode.precision / 10, mode), mode
    if loss_of(mode) > nll:
        return mode
    latest = mode

    def excess(log_precision: float) -> float:
        nonlocal latest
        latest = mode_at(math.exp(log_precision), latest)
        return math.log(max(loss_of(latest), 1e-300) / max(nll, 1e-300))

    root = brentq(excess, math.log(mode.precision), math.log(above.precision), xtol=0.02)
    return mode_at(math.exp(root), latest)


def without_own(marginal: Tensor, root: Tensor) -> Tensor:
    """Return the covariances that examples would have without their own curvature.

    Args:
        marginal: Covariances with it, ``(N, c, c)``.
        root: Roots ``R`` of the curvatures ``Rᵀ R``, ``(N, k, c)``.
    """
    # Woodbury, as a sum of positive matrices: rounding cannot make it anything else. In float64, as
    # eigenvectors of equal rows, which copies of a text have, may be NaN in float32.
    dtype, marginal, root = marginal.dtype, marginal.double(), root.double()
    spread = root @ marginal
    inner, vectors = torch.linalg.eigh(spread @ root.mT)
    share = inner.clamp(0, 1 - 10 * torch.finfo(dtype).eps)
    columns = spread.mT @ vectors
    return (marginal + (columns / (1 - share).unsqueeze(-2)) @ columns.mT).to(dtype)


def owners_of_sets(companions: Mapping[int, Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """Return those who are left out with each set of companions."""
    sets: dict[tuple[int, ...], list[int]] = {}
    for owner, members in companions.items():
        sets.setdefault(tuple(sorted(members)), []).append(owner)
    return sets


def _apply(blocks: Tensor, x: Tensor) -> Tensor:
    """Return a block diagonal matrix's product with ``(N c,)`` or ``(N c, m)``."""
    n, rows, columns = blocks.shape
    return torch.bmm(blocks, x.reshape(n, columns, -1)).reshape(n * rows, *x.shape[1:])
