"""The search for calibrated values: what labels leave open is averaged over, not chosen.

Few labels fit several numbers all too well. Each logarithm has a Gaussian prior around its present
value; predictions are averaged over the posterior of the numbers, by importance sampling from the
prior and from a Gaussian around the mode; chosen is the point whose predictions are nearest to the
average, in Hellinger's distance. With many labels that is the mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from scipy.optimize import least_squares, minimize
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from laplace_lora.likelihoods.quadrature import normal_points

LIMIT = 25.0  # of the logarithms that are searched
SEARCHED = 4096  # rows at most; of more, random ones, which leave as little open
FOLDS = 5
DEAL = 7_418_529_360_217  # seed of the folds; a shuffle by the same one would be undone
SAMPLES = 128  # from each of the two proposals, a power of two
WIDER = 1.5  # than the mode's own Gaussian is the one that is sampled from
STEP = 0.1  # of central differences, in widths of the prior
NEGLIGIBLE = 1e-4  # weight of a sample
WORST = 1e4  # loss of a row where it is not finite
ROUGH = {"xatol": 1e-3, "fatol": 1e-5, "maxiter": 200}
NEAR = {"diff_step": 1e-2, "ftol": 1e-5, "xtol": 1e-4, "gtol": 1e-12, "max_nfev": 50}
HOLD = 3e-4  # of each number to its present value, which holds what predictions hardly depend on

Point = tuple[float, ...]
Self = TypeVar("Self", bound="LabelledRows")


@dataclass(frozen=True)
class Found:
    """The values that a search chose.

    Attributes:
        best: The point; the start, if it is no worse on all rows.
        before: Mean loss of all rows at the start.
        after: And at the best point.
        cross_fitted: And of each fold of the rows at the point chosen from the others; not a number
            where all rows are one group.
    """

    best: Point
    before: float
    after: float
    cross_fitted: float


class PointPredictions(Protocol):
    """What a point says about some rows."""

    def losses(self, point: Any) -> Tensor:
        """Return the loss of every row, in nats."""
        ...

    def events(self, point: Any) -> Tensor:
        """Return probabilities of events that exclude each other, ``(rows, …, events)``."""
        ...


class LabelledRows(PointPredictions, Protocol):
    """Labelled rows, and what a point says about them."""

    @property
    def groups(self) -> Tensor:
        """Which rows belong together, in the same fold: numbers ``(rows,)``."""
        ...

    def some(self: Self, which: Tensor) -> Self:
        """Return some of the rows, by their places."""
        ...

    def ece(self, point: Any) -> float:
        """Return the calibration error at a point."""
        ...


def search_some(rows: LabelledRows, start: Point, widths: Sequence[float]) -> Found:
    """Return the result of `search`; of many rows some are searched, and all are scored.

    Random ones, the same at every call. Where several rows belong together, all are searched.
    """
    groups, count = rows.groups, len(rows.groups)
    if count <= SEARCHED or len(groups.unique()) < count:
        return search(rows, start, widths, groups)
    which = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SEARCHED]
    part = rows.some(which.sort().values.to(groups.device))
    found = search(part, start, widths, part.groups)
    present, fitted = rows.losses(start).double(), rows.losses(found.best).double()
    before, after = float(present.mean()), float(fitted.mean())
    if not after < before:
        return Found(start, before, before, before)
    # Rows that were not searched had no say in the choice: their loss is cross-fitted already. That
    # of the searched ones alone would differ from `before` by which rows they are.
    share = SEARCHED / count
    return Found(found.best, before, after, after + share * (found.cross_fitted - found.after))


def search(
    predictions: PointPredictions, start: Point, widths: Sequence[float], groups: Tensor
) -> Found:
    """Return the point whose predictions are nearest to the average over what labels leave open.

    Nearest is the smallest mean squared Hellinger distance. Near the average it is a quarter of the
    Kullback–Leibler divergence, and a sum of squares, which takes a tenth of the predictions.

    Args:
        predictions: Of the rows, at a point.
        start: The present values.
        widths: Standard deviations of the priors around the start.
        groups: Which rows belong together, in the same fold: numbers ``(rows,)``.
    """

    def point(z: Any) -> Point:
        return tuple(
            value + width * float(each) for value, width, each in zip(start, widths, z, strict=True)
        )

    def losses(z: Any) -> Tensor:
        return predictions.losses(point(z)).double().nan_to_num(WORST, WORST).clamp(max=WORST)

    folds = folds_of(groups)
    # A single group has no others that could choose for it.
    held_out = [folds == fold for fold in folds.unique()] if bool(folds.any()) else []
    everything = torch.ones_like(folds, dtype=torch.bool)
    kept = torch.stack([everything, *(~out for out in held_out)])
    z, weights = _posterior_samples(losses, len(start), kept)
    average = _averages(lambda z: predictions.events(point(z)), z, weights)

    def nearest(rows: Tensor, average: Tensor, *starts: Any) -> Any:
        roots = average[rows].sqrt()

        def differences(z: Any) -> Any:
            p = predictions.events(point(z)).double()[rows].nan_to_num(0.0)
            apart = (p.sqrt() - roots).flatten() / len(roots) ** 0.5
            return torch.cat([apart.cpu(), HOLD * torch.as_tensor(z, dtype=p.dtype)]).numpy()

        begin = min(starts, key=lambda z: float((differences(z) ** 2).sum()))
        return least_squares(differences, begin, **NEAR).x

    middles = (weights @ z).tolist()
    heaviest = z[int(weights[0].argmax())].tolist()
    best = nearest(everything, average[0], middles[0], heaviest)
    present, fitted = losses([0.0] * len(start)), losses(best)
    before, after = float(present.mean()), float(fitted.mean())
    total = 0.0
    for out, average_of_others in zip(held_out, average[1:], strict=True):
        found = losses(nearest(~out, average_of_others, best))
        is_better = float(found[~out].mean()) < float(present[~out].mean())
        total += float((found if is_better else present)[out].sum())
    moves = after < before
    best_point, after = (point(best), after) if moves else (start, before)
    cross_fitted = total / len(folds) if moves else before
    return Found(best_point, before, after, cross_fitted if held_out else math.nan)


def folds_of(groups: Tensor) -> Tensor:
    """Return the fold of each row, ``(rows,)``: random ones, the same at every call.

    The order of the data says nothing then: where classes take turns, every fifth row may be of one
    class, which the values chosen from the others have never seen.

    Args:
        groups: See `search`; folds have equally many, but for one.
    """
    number = groups.unique(return_inverse=True)[1].cpu()
    generator = torch.Generator().manual_seed(DEAL)
    order = torch.randperm(int(number.max()) + 1, generator=generator)
    return (order % FOLDS)[number].to(groups.device)


def _posterior_samples(
    losses: Callable[[Any], Tensor], dimensions: int, kept: Tensor
) -> tuple[Tensor, Tensor]:
    """Return samples of the numbers, in widths of the prior, and their weights.

    Args:
        losses: From such numbers to the loss of every row.
        dimensions: How many numbers there are.
        kept: Sets of rows, ``(sets, rows)``; the samples suit the first, which has all others.

    Returns:
        Samples ``(samples, dimensions)``, and for each set their weights ``(sets, samples)``.
    """
    prior = normal_points(SAMPLES, dimensions)
    table = torch.stack([losses(z) for z in prior.tolist()])
    objective = table.sum(1).cpu() + prior.square().sum(1) / 2
    mode = minimize(
        lambda z: float(losses(z).sum()) + float((z**2).sum()) / 2,
        prior[int(objective.argmin())].tolist(),
        method="Nelder-Mead",
        options=ROUGH,
    ).x
    around = MultivariateNormal(
        torch.as_tensor(mode), WIDER**2 * _covariance(losses, torch.as_tensor(mode))
    )
    local = around.loc + normal_points(SAMPLES, dimensions, seed=1) @ around.scale_tril.T
    z = torch.cat([prior, local])
    table = torch.cat([table, torch.stack([losses(each) for each in local.tolist()])]).cpu()
    density = Normal(0.0, 1.0).log_prob(z).sum(1)
    proposal = torch.logaddexp(density, around.log_prob(z))  # half of the samples are of each
    scores = density - proposal - kept.cpu().double() @ table.T
    return z, scores.softmax(1)


def _covariance(losses: Callable[[Any], Tensor], mode: Tensor) -> Tensor:
    """Return the covariance of a Gaussian around the mode, from the rows' own gradients."""
    steps = STEP * torch.eye(len(mode), dtype=mode.dtype)
    slopes = torch.stack(
        [
            (losses((mode + step).tolist()) - losses((mode - step).tolist())) / (2 * STEP)
            for step in steps
        ]
    ).cpu()
    precision = torch.eye(len(mode), dtype=mode.dtype) + slopes @ slopes.T
    return torch.cholesky_inverse(torch.linalg.cholesky(precision))


def _averages(probabilities: Callable[[Any], Tensor], z: Tensor, weights: Tensor) -> list[Tensor]:
    """Return the average probabilities of the rows under each set of weights."""
    sums: list[Any] = [0.0] * len(weights)
    for each, of_sets in zip(z.tolist(), weights.T, strict=True):
        if float(of_sets.max()) > NEGLIGIBLE:
            p = probabilities(each).double().nan_to_num(0.0)
            sums = [total + float(w) * p for total, w in zip(sums, of_sets, strict=True)]
    return sums


def exponential(value: float) -> float:
    """Return the exponential of a logarithm that is searched."""
    return math.exp(min(max(value, -LIMIT), LIMIT))
