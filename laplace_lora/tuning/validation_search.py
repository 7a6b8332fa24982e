"""Tuning a prior on a validation set from one pass over it.

All that a prior precision changes is the covariance ``Σ_k M_k / (e_k + δ)`` of the logits, so the
eigenvalues and products of one pass serve a whole grid, or a descent. What the posterior is belongs
to `posterior`; this room asks it for ``gram_blocks`` and ``labelled`` batches. Keeping a pass
belongs to `validation`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics import Metric

from laplace_lora.data import distributed as sharding
from laplace_lora.tuning.validation_cache import Scoring, validation_pass

Loss: TypeAlias = Metric | Callable[..., Any]
Gather: TypeAlias = Callable[[Tensor], Tensor]


def grid_search(
    la: Any,
    loader: DataLoader | None,
    grid: Tensor,
    scoring: Scoring,
    loss: Loss | None,
    progress_bar: bool,
) -> tuple[float, Tensor]:
    """Judge every scalar prior precision of a grid in one pass.

    Args:
        la: A fitted posterior.
        loader: Validation batches with labels.
        grid: Prior precisions, ``(values,)``.
        scoring: How predictives are judged.
        loss: A torchmetrics metric or a callable, fed as laplace-torch feeds it; ``None`` is the
            mean negative log likelihood, which stays finite where probabilities underflow.
        progress_bar: Show progress over the batches.

    Returns:
        The precision with the lowest loss, and all losses ``(values,)``.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    tally = _tally(loss, len(grid), scoring)
    gather = sharding.gather_for(loader)
    grid = grid.to(device=la._device, dtype=la._dtype)
    for mean, y, blocks in validation_pass(la, loader, progress_bar):
        covariance = mean.new_zeros(len(grid), len(mean), mean.shape[1], mean.shape[1])
        for _, grams in blocks:
            for e, products in grams:
                weights = 1 / (e.unsqueeze(1) + grid)
                covariance += (products @ weights).movedim(-1, 0)
        tally.update(mean, covariance, y)
    losses = tally.compute(gather)
    return float(grid[losses.nan_to_num(torch.inf).argmin()]), losses


def descend(
    la: Any,
    loader: DataLoader | None,
    groups: Tensor,
    scoring: Scoring,
    n_steps: int,
    lr: float,
    progress_bar: bool,
) -> Tensor:
    """Lower the validation NLL by gradient descent on the groups' log prior precisions.

    Source: the validation variant of Yang et al. (2024), arXiv:2308.13111, from one cached pass.

    Args:
        la: A fitted posterior; its prior is the start.
        loader: Validation batches with labels.
        groups: Group of each trainable tensor, ``(tensors,)``.
        scoring: How predictives are judged.
        n_steps: Steps of Adam.
        lr: Its step size, in nats of precision.
        progress_bar: Show progress over the batches.

    Returns:
        The best precisions seen, ``(tensors,)``; never worse than the start.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    cache = la.validation_cache(loader, groups, progress_bar)
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
    factors = best_factors.exp()[groups.to(best_factors.device)]
    return la.prior_precision.detach().expand(la.n_layers) * factors


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
            self.metrics, _predicted(self.scoring, mean, covariance), strict=True
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
        self.kept: list[list[tuple[Tensor, ...]]] = [[] for _ in range(values)]

    def update(self, mean: Tensor, covariance: Tensor, y: Tensor) -> None:
        for kept, predicted in zip(
            self.kept, _predicted(self.scoring, mean, covariance), strict=True
        ):
            kept.append((*predicted, y))

    def compute(self, gather: Gather) -> Tensor:
        joined = [
            [gather(torch.cat(column)) for column in zip(*kept, strict=True)] for kept in self.kept
        ]
        return torch.tensor([float(self.function(*columns)) for columns in joined]).double()


def _tally(loss: Loss | None, values: int, scoring: Scoring) -> Any:
    if loss is None:
        return _MeanNll(scoring)
    kind = _RunningMetric if isinstance(loss, Metric) else _Offline
    return kind(loss, values, scoring)


def _predicted(scoring: Scoring, mean: Tensor, covariance: Tensor) -> list[tuple[Tensor, ...]]:
    """Return what laplace-torch's losses are fed, for each covariance of a grid."""
    if scoring.sigma_noise is not None:
        return [(mean, one) for one in covariance]
    return [(one,) for one in scoring.log_probabilities(mean, covariance).exp()]
