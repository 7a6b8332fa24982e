"""From a diagonal posterior by parameter to a `DiagLoraLaplace`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from laplace_lora.data.sharding import unwrapped
from laplace_lora.display.warning import warn
from laplace_lora.posteriors.factored import DiagLoraLaplace

LIKELIHOODS = ("classification", "regression")


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
        curvatures: Diagonal curvature of the mean loss times the number of examples, by parameter;
            of a regression of the squared error's mean over examples and outputs.
        precisions: Prior precision, by parameter.
        n_data: Number of training examples.
        train_loader: Training data with labels, for the log evidence.
        **kwargs: Arguments of `DiagLoraLaplace`.

    Raises:
        ValueError: If the likelihood is another, the curvature of one of the model's trainable
            tensors is missing, or AdaLoRA's penalty was in the loss.

    Warns:
        UserWarning: If curvatures are negative; they are taken for zero.
    """
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood must be one of {LIKELIHOODS}, got {likelihood!r}: of others the mean loss "
            "that was trained is not known to be per example; fit a DiagLoraLaplace instead"
        )
    la = DiagLoraLaplace(model, likelihood, **kwargs)
    _check_no_penalty(la.logits_model.model)
    for name, p in zip(la.block_names, la.params, strict=True):
        if p not in curvatures:
            raise ValueError(f"the posterior does not hold {name!r}, which the model trains")
    prior = torch.tensor([precisions[p] for p in la.params])
    la.prior_precision = prior[:1] if bool((prior == prior[0]).all()) else prior
    curvature, data = torch.cat([curvatures[p].flatten() for p in la.params]), round(n_data)
    negative = (curvature < 0).double().mean().item()
    if negative:
        warn(
            f"the curvature of {negative:.2%} of the weights is negative, of which no posterior "
            "under another prior could be made; it is taken for zero. A second beta nearer to 1 "
            "makes it steadier"
        )
    curvature = curvature.clamp(min=0)
    if likelihood == "regression":
        outputs = la.logits_model.n_outputs
        if outputs is None:  # the data tell
            la.adopt(curvature, data, train_loader)
            outputs = la.n_outputs
        # A posterior's curvature is that of ½ Σ (f − y)², n/2 times the mean over n outputs, and
        # the mean's minimum and widths are those of a noise with variance n/2.
        curvature = curvature * (outputs / 2)
        if "sigma_noise" not in kwargs:
            la.sigma_noise = math.sqrt(outputs / 2)
    la.adopt(curvature, data, train_loader)
    return la


def _check_no_penalty(model: nn.Module) -> None:
    """Refuse AdaLoRA models whose loss holds the penalty that keeps their vectors orthogonal."""
    inner = unwrapped(model)
    configs = getattr(inner, "peft_config", {})
    for name in getattr(inner, "active_adapters", []):
        weight = getattr(configs[name], "orth_reg_weight", 0)
        if weight:
            raise ValueError(
                f"the adapter was trained with orth_reg_weight={weight}, and this penalty's "
                "curvature, which is far larger than that of the data, is in the optimiser's; "
                "train with AdaLoraConfig(orth_reg_weight=0), or fit a DiagLoraLaplace; where the "
                f"loss was without it, set model.peft_config[{name!r}].orth_reg_weight = 0"
            )
