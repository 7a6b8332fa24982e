"""What is read from a file, checked: numbers, vectors of weights, diagonals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from laplace_lora.linalg.rounded import widened
from laplace_lora.structures.posterior import Posterior


def weight_vector(posterior: Posterior, tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """Return a number for each weight, in the posterior's dtype; ``None`` if there are none."""
    if name not in tensors:
        return None
    vector = widened(tensors, name, posterior.dtype)
    if vector.shape != (sum(posterior.engine.sizes),):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}")
    return vector.to(posterior.device, posterior.dtype)


def count(scalars: Mapping[str, Any], name: str) -> int:
    """Return a positive whole number."""
    value = scalars[name]
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} is {value!r}")
    return value


def positive(scalars: Mapping[str, Any], name: str) -> float:
    """Return a positive number."""
    value: float = scalars[name]
    if type(value) is not float or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}, not a positive number")
    return value


def check_diagonals(packed: Mapping[str, Tensor]) -> None:
    """Refuse curvatures with a negative diagonal."""
    for name, tensor in packed.items():
        stem = name.rpartition(".")[2]
        square = stem == "matrix" and tensor.ndim == 2
        diagonal = tensor.diagonal() if square else tensor
        if stem in ("matrix", "diagonal", "curvature", "trace") and bool((diagonal < 0).any()):
            raise ValueError(f"the curvature has negative entries on its diagonal ({name!r})")
