"""Predictions from sampled weights: the model itself, run once per sample (NN predictive)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
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
    model = posterior.model
    if posterior.last_layer is not None:
        outputs = _head_outputs(posterior, posterior.last_layer, x, n_samples, generator)
    else:
        check_runs(model, posterior.engine.parameters)
        outputs = []
        # On a twin: other threads may be running the model meanwhile.
        with evaluation_mode(model), resampled(model, posterior.engine.parameters) as (twin, own):
            for _ in range(n_samples):
                set_weights(own, posterior.centre + posterior.deviations(1, generator)[0])
                with as_called():
                    outputs.append(twin(x))
    check_finite(outputs[0])
    return torch.stack(outputs) / posterior.settings.likelihood_temperature


def _head_outputs(
    posterior: Posterior,
    model: LastLayerModel,
    x: Any,
    n_samples: int,
    generator: torch.Generator | None,
) -> list[Tensor]:
    features = [model.features(part) for part in passes(x)]
    head, outputs = model.head, []
    for _ in range(n_samples):
        sample = posterior.centre + posterior.deviations(1, generator)[0]
        size = head.weight.numel()
        weight, bias = sample.split([size, len(sample) - size])
        weight = weight.view_as(head.weight)
        shift = None if head.bias is None else bias
        outputs.append(torch.cat([F.linear(part, weight, shift) for part in features], dim=-1))
    return outputs
