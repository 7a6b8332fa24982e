"""From a diagonal posterior by parameter to a `DiagLoraLaplace`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_lora.posteriors.factored import DiagLoraLaplace


def to_diagonal_laplace(
    model: nn.Module,
    likelihood: str,
    curvatures: Mapping[nn.Parameter, Tensor],
    precisions: Mapping[nn.Parameter, float],
    n_data: float,
    train_loader: DataLoader[Any] | None,
    **kwargs: Any,
) -> DiagLoraLaplace:
    """Return a `DiagLoraLaplace` with a given curvature and prior, at the model's weights.

    Args:
        model: The trained model, see `DiagLoraLaplace`.
        likelihood: ``"classification"`` or ``"regression"``.
        curvatures: Diagonal curvature of the summed loss, by parameter.
        precisions: Prior precision, by parameter.
        n_data: Number of training examples.
        train_loader: Training data with labels, for the log evidence.
        **kwargs: Arguments of `DiagLoraLaplace`.

    Raises:
        ValueError: If the curvature of one of the model's trainable tensors is missing.
    """
    la = DiagLoraLaplace(model, likelihood, **kwargs)
    for name, p in zip(la.block_names, la.params, strict=True):
        if p not in curvatures:
            raise ValueError(f"the posterior does not hold {name!r}, which the model trains")
    prior = torch.tensor([precisions[p] for p in la.params])
    la.prior_precision = prior[:1] if bool((prior == prior[0]).all()) else prior
    la.adopt(torch.cat([curvatures[p].flatten() for p in la.params]), round(n_data), train_loader)
    return la
