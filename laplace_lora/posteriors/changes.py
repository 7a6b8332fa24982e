"""What is no longer as it was at a fit: tensors that a posterior does not cover, and settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from laplace_lora.adapters.configuration import OF_CONFIGURATION, function_settings
from laplace_lora.adapters.frozen_values import TensorPlace
from laplace_lora.adapters.layer_settings import single, without_factor
from laplace_lora.adapters.model_settings import OF_MODEL
from laplace_lora.posteriors.fitted_weights import ROUNDING, are_equal


def changes(
    places: Iterable[TensorPlace],
    frozen: Mapping[str, Tensor],
    source: nn.Module,
    adapter: Mapping[str, Any],
) -> tuple[list[TensorPlace], list[str]]:
    """Return the tensors, and the settings by name, that are others than at a fit.

    Args:
        places: Tensors to look at.
        frozen: Samples of their values at the fit, by name.
        source: The model.
        adapter: The settings at the fit, see `function_settings`.
    """
    settings = function_settings(source)
    others = [
        name for name, then in adapter.items() if not _is_same(name, then, settings.get(name, then))
    ]
    return [place for place in places if _has_moved(place, frozen)], others


def _has_moved(place: TensorPlace, fitted: Mapping[str, Tensor]) -> bool:
    """Return whether a tensor has other values than at the fit, as far as these are known."""
    then, now = fitted.get(place.name), place.samples()
    if then is None or not len(then) or not len(now):
        return False  # added since, or offloaded
    if then.shape != now.shape or not (then.is_floating_point() and now.is_floating_point()):
        return not torch.equal(now, then)
    # A base model may come back in another dtype; merging and unmerging an adapter rounds, too.
    rounding = max(ROUNDING, *(torch.finfo(t.dtype).eps for t in (now, then)))
    return not are_equal(now, then, rounding)


def _is_same(name: str, then: Any, now: Any) -> bool:
    """Return whether settings are the same, but for a factor's rounding to single precision.

    Earlier versions have kept no factor that was a tensor.
    """
    if name.startswith(OF_MODEL):
        return bool(then == now)
    if then == now or not (isinstance(then, list) and isinstance(now, list)):
        return bool(then == now)
    if not name.startswith(OF_CONFIGURATION) and then == without_factor(then):
        return then == without_factor(now)
    return single(then) == single(now)
