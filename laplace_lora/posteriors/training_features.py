"""The features of training data and their labels, of which laplace-torch checks nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from laplace_lora.capture.output_verification import verify_outputs
from laplace_lora.likelihoods.base import Likelihood
from laplace_lora.likelihoods.label_check import check_loss
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import coarsest_dtype
from laplace_lora.models.last_layer_model import LastLayerModel


def training_features(
    model: LastLayerModel, objective: Likelihood, batches: Iterable[tuple[Any, Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return features and labels, batch by batch; models run under the caller's autocast.

    The first batch, and the first of several examples, are verified, see `verify_outputs`: layers
    that mix examples show it in the latter alone.

    Args:
        model: Computes the features; its head is the one that they are for.
        objective: Refuses labels.
        batches: Inputs and labels, see `Likelihood.split`.

    Raises:
        ValueError: If labels are none that the model can have, or padding counts.
        FloatingPointError: If a loss is not finite; names the batch.
        RuntimeError: As `LastLayerModel`, or if `verify_outputs` finds fault with a batch.
    """
    features, labels, verified = [], [], 0
    for index, (x, y) in enumerate(batches):
        with as_called():
            seen = model.features(x)
        with torch.no_grad():
            outputs = model.head(seen)
        try:
            check_loss(objective.nll(outputs, y), y)
        except FloatingPointError as error:
            raise FloatingPointError(f"batch {index} of the training data: {error}") from error
        if min(len(y), 2) > verified:
            with as_called():
                verify_outputs(model, x, outputs, len(y), coarsest_dtype(model.source))
            verified = min(len(y), 2)
        features.append(seen)
        labels.append(y)
    return features, labels
