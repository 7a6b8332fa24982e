"""Tune a prior on a validation set from one pass over it.

All that a prior precision changes is the covariance ``Σ_k M_k / (e_k + δ)`` of the logits, so one
pass serves a whole grid, or a descent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import reduce
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from laplace_lora.data.distributed import ALONE, Together
from laplace_lora.likelihoods.base import Scoring
from laplace_lora.linalg.spectrum_nodes import SpectrumNodes
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import (
    ValidationCache,
    validation_pass,
    validation_rows,
)
from laplace_lora.tuning.validation.coupled_cache import CoupledCache

Loss: TypeAlias = Metric | Callable[..., Any]


def grid_search(
    predictor: Predictor,
    loader: Any,
    grid: Tensor,
    scoring: Scoring,
    loss: Loss | None,
    progress_bar: bool | None,
    team: Together = ALONE,
) -> tuple[float, Tensor]:
    """Score every scalar prior precision of a grid in one pass.

    Args:
        predictor: Of a fitted posterior.
        loader: Validation batches with labels.
        grid: Prior precisions, ``(values,)``.
        scoring: How predictions are scored.
        loss: A torchmetrics metric or a callable, fed as laplace-torch feeds it; ``None`` is the
            mean negative log likelihood, which stays finite where probabilities underflow.
        progress_bar: Whether to show progress, see `progress`.
        team: The processes that share the loader.

    Returns:
        The precision with the lowest loss, and all losses ``(values,)``.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels, or others than the
            model's.
        FloatingPointError: If no loss is finite.
    """
    tally = _tally(loss, len(grid), scoring, team)
    posterior = predictor.posterior
    grid = grid.to(device=posterior.device, dtype=posterior.dtype)
    spectra = posterior.precision.spectra()
    nodes = SpectrumNodes.covering(e for s in spectra for e, times in s if times)
    variances = 1 / (nodes.values.to(grid).unsqueeze(1) + grid)

    def shares(_: int, e: Tensor) -> Tensor:
        return nodes.shares(e)

    batches = validation_pass(predictor, loader, team, scoring.readout, shares, progress_bar)
    for mean, y, forms in batches:
        total = reduce(torch.add, (form for _, form in forms))
        tally.update(mean, (total @ variances.to(total)).movedim(-1, 0), y)
    losses = tally.compute(team)
    if not bool(losses.isfinite().any()):
        raise FloatingPointError(
            "no prior precision of the grid has a finite loss, so none is best; check the `loss` "
            "that was given, and the validation data"
        )
    return float(grid[losses.nan_to_num(torch.inf).argmin()]), losses


def descend(
    cache: ValidationCache | CoupledCache, groups: Tensor, scoring: Scoring, n_steps: int, lr: float
) -> Tensor:
    """Lower the validation NLL by gradient descent on the groups' log prior precisions.

    Source: the validation variant of Yang et al. (2024), arXiv:2308.13111, from one cached pass.

    Args:
        cache: The validation set at the start's prior.
        groups: Group of each trainable tensor, ``(tensors,)``.
        scoring: How predictions are scored.
        n_steps: Steps of Adam.
        lr: Its step size, in nats of precision.

    Returns:
        Factors on the tensors' precisions, ``(tensors,)``: the best seen, never worse than 1.
    """
    log_factors = cache.mean.new_zeros(int(groups.max()) + 1, requires_grad=True)
    optimizer = torch.optim.Adam([log_factors], lr=lr)
    best, best_factors = torch.inf, log_factors.detach().clone()
    with torch.enable_grad():
        for step in range(n_steps + 1):
            nll = scoring.nll(cache.mean, cache.covariance(log_factors.exp()), cache.y).mean()
            if nll.item() < best:
                best, best_factors = nll.item(), log_factors.detach().clone()
            if step < n_steps:
                optimizer.zero_grad()
                nll.backward()
                optimizer.step()
    return best_factors.exp()[groups.to(best_factors.device)]


class _MeanNll:
    def __init__(self, values: int, scoring: Scoring) -> None:
        self.scoring = scoring
        self.totals = torch.zeros(values, dtype=torch.float64)
        self.count = 0

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        self.totals += self.scoring.nll(mean, covariance, y).double().sum(-1).cpu()
        self.count += len(y)

    def compute(self, team: Together) -> Tensor:
        *totals, count = team.total(*self.totals.tolist(), self.count)
        if not count:
            raise ValueError("the validation loader is empty")
        return torch.tensor(totals, dtype=torch.float64) / count


class _RunningMetric:
    def __init__(self, metric: Metric, values: int, scoring: Scoring) -> None:
        self.metrics = [_alone(metric) for _ in range(values)]
        self.scoring = scoring

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        for metric, predicted in zip(
            self.metrics, self.scoring.metric_arguments(mean, covariance), strict=True
        ):
            _feed(metric, *predicted, y)

    def compute(self, team: Together) -> Tensor:
        return torch.stack([metric.compute().sum().double() for metric in self.metrics])


class _Offline:
    def __init__(self, function: Callable[..., Any], values: int, scoring: Scoring) -> None:
        self.function = function
        self.scoring = scoring
        self.columns: dict[str, list[Tensor]] = {}
        self.values = values

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        for i, predicted in enumerate(self.scoring.metric_arguments(mean, covariance)):
            for j, argument in enumerate((*predicted, y)):
                self.columns.setdefault(f"{i}.{j}", []).append(argument)

    def compute(self, team: Together) -> Tensor:
        rows = validation_rows(team, **self.columns)
        arguments: list[list[Tensor]] = [[] for _ in range(self.values)]
        for name, column in rows.items():
            arguments[int(name.split(".")[0])].append(column)
        return torch.tensor([float(self.function(*each)) for each in arguments]).double()


def _alone(metric: Metric) -> Metric:
    """Return a copy that has no collectives of its own."""
    copied = copy.deepcopy(metric)
    copied.distributed_available_fn = lambda: False
    return copied


def _feed(metric: Metric, *arguments: Tensor) -> None:
    *predicted, y = arguments
    try:
        metric.to(y.device).update(*predicted, y)
    except TypeError:  # a metric of the mean alone
        metric.update(predicted[0], y)


def _tally(
    loss: Loss | None, values: int, scoring: Scoring, team: Together
) -> _MeanNll | _RunningMetric | _Offline:
    if loss is None:
        return _MeanNll(values, scoring)
    if not isinstance(loss, Metric):
        return _Offline(loss, values, scoring)
    if not team.shared:
        return _RunningMetric(loss, values, scoring)

    def value(*arguments: Tensor) -> Tensor:
        metric = _alone(loss)
        _feed(metric, *arguments)
        return metric.compute().sum()

    return _Offline(value, values, scoring)
