"""Refuse last layers that plain laplace-torch would not read as one linear map of each example."""

from __future__ import annotations

from typing import Any

from laplace_lora.adapters.selection import is_trained


def check_last_layer(model: Any) -> None:
    """Refuse a last layer that laplace-torch's last-layer classes would fit and fail to predict by.

    Args:
        model: laplace-torch's `FeatureExtractor` around a model that is no `LastLayerModel`. What
            its last layer sees is known once it has run, as it has in a fit.

    Raises:
        ValueError: If the last layer is frozen, or sees more than one vector per example.
    """
    head, name = model.last_layer, getattr(model, "_last_layer_name", None)
    if head is None:  # not found yet
        return
    seen = getattr(model, "_features", {}).get(name)
    is_reduced = getattr(model, "feature_reduction", None) is not None
    if not any(is_trained(parameter) for parameter in head.parameters()):
        fault = "is frozen"
    elif seen is not None and seen.ndim != 2 and not is_reduced:
        fault = f"sees an input of shape {tuple(seen.shape)}, not one vector per example"
    else:
        return
    raise ValueError(
        f"the last layer that laplace-torch found, {name!r}, {fault}; wrap the model in a "
        "LastLayerModel (of laplace_lora.models.last_layer_model), or use "
        "subset_of_weights='lora_last_layer', or 'lora' for the adapter's weights"
    )
