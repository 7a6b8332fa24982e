"""Tune a prior on a validation set from one pass over it.

All that a prior precision changes is the covariance ``Σ_k M_k / (e_k + δ)`` of the logits, so the
eigenvalues and products of one pass serve a whole grid, or a descent.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric

from laplace_lora.data.distributed import gather_for
from laplace_lora.likelihoods.base import Scoring
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation_cache import Cache, validation_pass

Loss: TypeAlias = Metric | Callable[..., Any]
Gather: TypeAlias = Callable[[Tensor], Tensor]


def grid_search(
    predictor: Predictor,
    loader: Any,
    grid: Tensor,
    scoring: Scoring,
    loss: Loss | None,
    progress_bar: bool,
) -> tuple[float, Tensor]:
    """Score every scalar prior precision of a grid in one pass.

    Args:
        predictor: Of a fitted posterior.
        loader: Validation batches with labels.
        grid: Prior precisions, ``(values,)``.
        scoring: How predictions are scored.
        loss: A torchmetrics metric or a callable, fed as laplace-torch feeds it; ``None`` is the
            mean negative log likelihood, which stays finite where probabilities underflow.
        progress_bar: Show progress over the batches.

    Returns:
        The precision with the lowest loss, and all losses ``(values,)``.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    tally = _tally(loss, len(grid), scoring)
    gather = gather_for(loader)
    posterior = predictor.posterior
    grid = grid.to(device=posterior.device, dtype=posterior.dtype)
    for mean, y, blocks in validation_pass(predictor, loader, scoring.readout, progress_bar):
        covariance = mean.new_zeros(len(grid), len(mean), mean.shape[1], mean.shape[1])
        for _, grams in blocks:
            for e, products in grams:
                weights = 1 / (e.unsqueeze(1) + grid)
                covariance += (products @ weights).movedim(-1, 0)
        tally.update(mean, covariance, y)
    losses = tally.compute(gather)
    return float(grid[losses.nan_to_num(torch.inf).argmin()]), losses


def descend(cache: Cache, groups: Tensor, scoring: Scoring, n_steps: int, lr: float) -> Tensor:
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


class _Tally(Protocol):
    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None: ...

    def compute(self, gather: Gather) -> Tensor: ...


class _MeanNll:
    def __init__(self, scoring: Scoring) -> None:
        self.scoring = scoring
        self.total: Any = 0.0
        self.count = 0

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        self.total = self.total + self.scoring.nll(mean, covariance, y).double().sum(-1)
        self.count += len(y)

    def compute(self, gather: Gather) -> Tensor:
        total, count = torch.as_tensor(self.total), torch.tensor([self.count])
        sums = gather(total.unsqueeze(0)).sum(0)
        return sums / gather(count.to(sums.device)).sum()


class _RunningMetric:
    def __init__(self, metric: Metric, values: int, scoring: Scoring) -> None:
        self.metrics = [copy.deepcopy(metric) for _ in range(values)]
        self.scoring = scoring

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        for metric, predicted in zip(
            self.metrics, self.scoring.metric_arguments(mean, covariance), strict=True
        ):
            try:
                metric.to(y.device).update(*predicted, y)
            except TypeError:  # a metric of the mean alone
                metric.update(predicted[0], y)

    def compute(self, gather: Gather) -> Tensor:
        return torch.stack([metric.compute().sum().double() for metric in self.metrics])


class _Offline:
    def __init__(self, function: Callable[..., Any], values: int, scoring: Scoring) -> None:
        self.function = function
        self.scoring = scoring
        self.columns: list[list[tuple[Tensor, ...]]] = [[] for _ in range(values)]

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        for columns, predicted in zip(
            self.columns, self.scoring.metric_arguments(mean, covariance), strict=True
        ):
            columns.append((*predicted, y))

    def compute(self, gather: Gather) -> Tensor:
        joined = [
            [gather(torch.cat(column)) for column in zip(*columns, strict=True)]
            for columns in self.columns
        ]
        return torch.tensor([float(self.function(*arguments)) for arguments in joined]).double()


def _tally(loss: Loss | None, values: int, scoring: Scoring) -> _Tally:
    if loss is None:
        return _MeanNll(scoring)
    if isinstance(loss, Metric):
        return _RunningMetric(loss, values, scoring)
    return _Offline(loss, values, scoring)
