"""Predictions from sampled weights: the model itself, run once per sample (NN predictive)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laplace_lora.adapters.in_use import check_runs
from laplace_lora.data.pairs import passes
from laplace_lora.likelihoods.links import check_finite
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import evaluation_mode, set_weights
from laplace_lora.models.changes.twins import resampled
from laplace_lora.models.last_layer_model import LastLayerModel
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import check_count

Network: TypeAlias = tuple[nn.Module, list[nn.Parameter]]  # and its tensors to overwrite


@contextmanager
def sampled_network(posterior: Posterior) -> Iterator[Network]:
    """Yield the model in evaluation mode with tensors to overwrite, see `resampled`.

    A twin, as other threads may be running the model meanwhile.

    Raises:
        RuntimeError: If a tensor does not run in the model as it is, see `check_runs`.
    """
    model, parameters = posterior.model, posterior.engine.parameters
    check_runs(model, parameters)
    with torch.no_grad(), evaluation_mode(model), resampled(model, parameters) as (twin, own):
        yield twin, own


def run_with(network: Network, weights: Tensor, x: Any) -> Tensor:
    """Return a network's outputs for a batch under some weights, ``(parameters,)``."""
    twin, own = network
    set_weights(own, weights)
    with as_called():
        outputs: Tensor = twin(x)
    return outputs


@torch.no_grad()
def sampled_outputs(
    posterior: Posterior, x: Any, n_samples: int, generator: torch.Generator | None
) -> Tensor:
    """Return the model's outputs under sampled weights; the model keeps its own, see `resampled`.

    A last-layer posterior computes its features once.

    Args:
        posterior: A fitted posterior.
        x: Batch that the model takes.
        n_samples: Samples of the weights.
        generator: Their source, on the posterior's device.

    Returns:
        Shape ``(n_samples, batch, outputs)``.

    Raises:
        ValueError: If gradients are asked for, or ``n_samples`` is not positive.
        FloatingPointError: If the outputs are not finite; names the rows.
        RuntimeError: If a tensor does not run in the model as it is, see `check_runs`.
    """
    if posterior.differentiable:
        raise ValueError("pred_type='nn' cannot be differentiated; use pred_type='glm'")
    check_count("n_samples", n_samples)

    def sample() -> Tensor:
        return posterior.centre + posterior.deviations(1, generator)[0]

    if posterior.last_layer is not None:
        outputs = _head_outputs(posterior.last_layer, x, (sample() for _ in range(n_samples)))
    else:
        with sampled_network(posterior) as network:
            outputs = [run_with(network, sample(), x) for _ in range(n_samples)]
    check_finite(outputs[0])
    return torch.stack(outputs) / posterior.settings.likelihood_temperature


def _head_outputs(model: LastLayerModel, x: Any, samples: Iterable[Tensor]) -> list[Tensor]:
    features = [model.features(part) for part in passes(x)]
    head, outputs = model.head, []
    size = head.weight.numel()
    for sample in samples:
        weight, bias = sample.split([size, len(sample) - size])
        weight = weight.view_as(head.weight)
        shift = None if head.bias is None else bias
        outputs.append(torch.cat([F.linear(part, weight, shift) for part in features], dim=-1))
    return outputs
