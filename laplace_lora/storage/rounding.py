"""Recognise a model that was loaded in half precision by what its weights round to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.display.warning import warn
from laplace_lora.storage.base_samples import BASE_SAMPLES, BaseSamples
from laplace_lora.storage.fingerprint import exact_fingerprint
from laplace_lora.storage.identity import (
    IN_USE,
    base_in_use,
    is_by_name,
    known_identity,
    trained_tensors,
)
from laplace_lora.structures.posterior import Posterior

ROUNDED = "rounded_weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def rounded_fingerprints(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """Return for each tensor its norm, and by dtype the hash and the error of its rounding.

    A dtype is left out where it cannot hold the values.
    """
    return {
        name: {
            "norm": float(tensor.detach().double().norm()),
            **{
                key: [_hash(tensor, dtype), float(_error(tensor, dtype).norm())]
                for key, dtype in DTYPES.items()
                if bool(_error(tensor, dtype).isfinite().all())
            },
        }
        for name, tensor in tensors
    }


def identity_but_for_rounding(posterior: Posterior, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return a posterior's identity, with the saved one's weights if its own are these, rounded.

    Warns how far they are apart, of the adapter. Weights that differ by more than rounding are left
    for `check_identity` to refuse.

    Args:
        posterior: A posterior around the model as it was loaded.
        saved: Configuration of a file; those of earlier versions know no rounding.
    """
    found, plain = known_identity(posterior, saved)
    if BASE_SAMPLES in saved and saved[IN_USE] != found[IN_USE]:
        base = BaseSamples.of(base_in_use(posterior, plain, is_by_name(saved)))
        if base.are_those_of(BaseSamples.unpacked(saved[BASE_SAMPLES])):
            found |= {IN_USE: saved[IN_USE]}
    if all(saved[key] == found[key] for key in ("weights", "adapter")) or ROUNDED not in saved:
        return found
    tensors = dict(trained_tensors(posterior, plain))
    errors = [_distance(saved[ROUNDED].get(name), tensor) for name, tensor in tensors.items()]
    apart = sum(error**2 for error in errors if error)
    if set(tensors) != set(saved[ROUNDED]) or None in errors or not apart:
        return found
    apart /= sum(saved[ROUNDED][name]["norm"] ** 2 for name in tensors)
    warn(
        "the adapter's weights are those that the posterior was fitted at, rounded to a coarser "
        f"dtype: they differ by {apart**0.5:.1e} of their norm. Load the model in the dtype of the "
        "fit, or fit again, for a posterior of exactly these weights",
    )
    return {**found, "weights": saved["weights"], "adapter": saved["adapter"]}


def _distance(saved: Mapping[str, Any] | None, tensor: Tensor) -> float | None:
    """Return how far a saved tensor is from one that it rounds to; ``None`` if it does not."""
    if saved is None:
        return None
    for key, dtype in DTYPES.items():
        known = saved.get(key)  # files of earlier versions know nothing of float16
        if known is None or bool(_error(tensor, dtype).any()):
            continue
        if known[0] == _hash(tensor, dtype):
            return float(known[1])
    return None


def _hash(tensor: Tensor, dtype: torch.dtype) -> str:
    return exact_fingerprint([("", tensor.detach().to(dtype))])[:16]


def _error(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    exact = tensor.detach().float()
    return exact - exact.to(dtype).float()
