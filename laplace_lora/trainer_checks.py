"""What `LaplaceCallback` checks before the first step of a training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

from laplace_lora.data.batches import one_example
from laplace_lora.models.changes.modes import evaluation_mode
from laplace_lora.posteriors.base import LoraLaplace
from laplace_lora.structures.posterior import Posterior


def check_makes_predictions(kind: Any) -> None:
    """Refuse a class whose objects cannot predict data sets or be saved.

    Args:
        kind: What makes the posterior. Of a function only a call can tell.

    Raises:
        TypeError: If it is one.
    """
    while isinstance(kind, partial):
        kind = kind.func
    if isinstance(kind, type) and not issubclass(kind, LoraLaplace):
        raise TypeError(
            f"a {kind.__name__} cannot be fitted by LaplaceCallback; take one of the "
            "posteriors with `predict` and `save_pretrained`, such as KronLoraLaplace"
        )


def check_loaders(posterior: Posterior, loaders: Mapping[str, Iterable[Any]]) -> None:
    """Refuse loaders that a fit or an evaluation would refuse at their first example.

    Args:
        posterior: What will be fitted.
        loaders: By what they are called in errors.

    Raises:
        ValueError: If one is empty, without labels or with labels out of range.
        TypeError: If a batch is neither mapping nor pair.
    """
    for name, loader in loaders.items():
        try:
            batch = next(iter(loader), None)
            if batch is not None:
                _try_out(posterior, batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name} data: {error}") from error
        if batch is None:
            raise ValueError(
                f"the {name} loader has no batch: the data are empty, or fewer than a "
                "batch with dataloader_drop_last"
            )


def check_data_set(data: Any) -> None:
    """Refuse what a trainer makes no test loader of.

    Args:
        data: What is to be predicted.

    Raises:
        TypeError: If it is a loader, or texts.
    """
    first = data[0] if isinstance(data, list | tuple) and data else data
    if isinstance(data, DataLoader) or isinstance(first, str):
        what = "a loader" if isinstance(data, DataLoader) else "texts"
        raise TypeError(
            f"callback.predict takes a data set, as trainer.predict does, got {what}; give these "
            "to the posterior, callback.la.predict"
        )


@torch.no_grad()
def _try_out(posterior: Posterior, batch: Any) -> None:
    """Compute the loss of one example, of all where a batch cannot be taken apart."""
    posterior.split(batch)
    batch = posterior.by_example(batch)
    x, y = posterior.split(one_example(batch, 0) if posterior.divides(batch) else batch)
    with evaluation_mode(posterior.model):
        posterior.objective.nll(posterior.model(x), y)
