"""A state from what was read, of a file or a state dictionary: impossible values are refused."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor

from laplace_lora.linalg.finite import all_finite
from laplace_lora.linalg.rounded import widened
from laplace_lora.storage.uncalibrated import uncalibrated_from
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.second_means import with_second_means
from laplace_lora.structures.settings import SCALES, TENSORS, Settings
from laplace_lora.structures.state import PosteriorState
from laplace_lora.structures.subspace import Subspace, subspace_from

GRADIENT = "loss_gradient"
SHIFT = "shift"


def checked_state(
    posterior: Posterior,
    curvature: Any,
    mean: Tensor,
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Any],
) -> PosteriorState:
    """Return a state whose numbers are possible ones, in tensors of its own.

    Args:
        posterior: A posterior of the class and arguments that the state is of.
        curvature: What its structure has made of the saved one.
        mean: MAP weights, ``(parameters,)``.
        tensors: Finite ones: prior, noise, shift, gradient and subspace; not all have the latter.
            With those of `uncalibrated_entries` after a calibration.
        numbers: The loss, counts and scales, and likewise.

    Raises:
        ValueError: If a value is impossible, or does not fit the model's tensors; names it.
        KeyError: If one is missing.
    """
    sizes = tuple(posterior.engine.sizes)
    n = sum(sizes)
    precision, prior_mean, noise = (tensors[name] for name in TENSORS)
    _check_shapes(posterior, precision, noise)
    if prior_mean.shape not in [(), (1,), (n,)]:
        raise ValueError("the prior's mean does not fit the model's tensors")
    scales = {name: numbers[name] for name in SCALES}
    shift = _weight_vector(posterior, tensors, SHIFT)
    settings = Settings(precision, prior_mean, noise, shift=shift, **scales)
    before = uncalibrated_from(tensors, numbers)
    if before is not None:
        _check_shapes(posterior, before.prior_precision, before.sigma_noise)
        settings = settings.calibrated_from(before)
    if type(numbers["loss"]) is not float:
        raise ValueError(f"loss is {numbers['loss']!r}")
    n_data = _count(numbers, "n_data")
    return PosteriorState(
        settings=settings.own(),
        curvature=with_second_means(posterior.engine, curvature, numbers, n_data),
        mean=mean,
        sizes=sizes,
        loss=numbers["loss"],
        n_data=n_data,
        n_outputs=_count(numbers, "n_outputs"),
        loss_gradient=_weight_vector(posterior, tensors, GRADIENT),
        subspace=_subspace(posterior, tensors),
    )


def _check_shapes(posterior: Posterior, precision: Tensor, noise: Tensor) -> None:
    sizes = posterior.engine.sizes
    n = sum(sizes)
    if precision.shape not in [(1,), (len(sizes),), (n,)] or noise.shape not in [(), (1,)]:
        raise ValueError("prior and noise do not fit the model's tensors")
    posterior.structure.check_prior(len(precision), len(sizes), n)


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not finite.

    Raises:
        ValueError: If one is not; names it.
    """
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise ValueError(f"tensor {name!r} is not finite")


def _weight_vector(posterior: Posterior, tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Return a number for each weight, in the posterior's dtype; ``None`` if there are none."""
    if name not in tensors:  # earlier versions have no gradient
        return None
    vector = widened(tensors, name, posterior.dtype)
    if vector.shape != (sum(posterior.engine.sizes),):
        raise ValueError(f"{name} has shape {tuple(vector.shape)}")
    return vector.to(posterior.device, posterior.dtype)


def _subspace(posterior: Posterior, tensors: Mapping[str, Tensor]) -> Subspace | None:
    subspace, count = subspace_from(tensors), len(posterior.engine.sizes)
    if subspace is None:
        return None
    if len(subspace.displacement) != count:
        raise ValueError(f"the subspace is of {len(subspace.displacement)} tensors, not {count}")
    return subspace.to(posterior.device)


def _count(numbers: Mapping[str, Any], name: str) -> int:
    value = numbers[name]
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a positive whole number")
    return int(value)
