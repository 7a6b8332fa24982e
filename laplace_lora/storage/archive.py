"""A posterior as files beside its adapter: saving it, and reading it back.

``laplace.safetensors`` holds tensors and configuration, ``laplace_config.json`` the latter once
more, see `files`. Nothing is ever unpickled, and no path is read from a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from laplace_lora.adapters.configuration import function_settings
from laplace_lora.adapters.frozen_values import frozen_values
from laplace_lora.adapters.in_use import check_runs
from laplace_lora.adapters.packed_weights import bits_of
from laplace_lora.adapters.plain_names import named_as
from laplace_lora.data.distributed import together
from laplace_lora.data.sharding import is_sharded_model
from laplace_lora.data.shares import is_main
from laplace_lora.linalg.rounded import rounded
from laplace_lora.storage.base_samples import BASE_SAMPLES, BaseSamples
from laplace_lora.storage.checked import GRADIENT, SHIFT, check_finite, checked_state
from laplace_lora.storage.files import COMPACT, CONFIG, RECENTRED, TENSORS, VERSION, write_files
from laplace_lora.storage.identity import (
    BASE_BITS,
    base_in_use,
    check_identity,
    identity,
    trained_tensors,
)
from laplace_lora.storage.rounding import (
    ROUNDED,
    identity_but_for_rounding,
    rounded_fingerprints,
)
from laplace_lora.storage.uncalibrated import UNCALIBRATED_TENSORS, uncalibrated_entries
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.second_means import MEANS, SECOND
from laplace_lora.structures.settings import SCALES
from laplace_lora.structures.settings import TENSORS as SETTINGS
from laplace_lora.structures.state import PosteriorState
from laplace_lora.structures.subspace import SUBSPACE, subspace_entries

PREFIX = "curvature."
SUBSPACE_MEAN = f"{SUBSPACE}prior_mean"
FURTHER = "further_tensors"  # names of those that are no curvature, some of which may be missing
TUNING = "tuning"
EXACT = "exact"
PRECISIONS = ("half", EXACT)  # the first is the default
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of tensors in a file


def save_posterior(
    posterior: Posterior,
    folder: Path,
    backend: str,
    precision: str,
    tuning: Mapping[str, Any] | None,
) -> None:
    """Write a fitted posterior into a folder.

    A reader finds the earlier posterior or this one, at any moment, see `files`. All processes call
    this for a sharded model; the main one writes.

    Args:
        posterior: A fitted posterior.
        folder: The folder; made if missing.
        backend: Name of the backend's class.
        precision: One of `PRECISIONS`.
        tuning: How the prior was tuned, in values that JSON can hold.

    Raises:
        ValueError: If ``precision`` is none of them.
        RuntimeError: If the adapter does not run in the model as it is, see `check_runs`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    _check_runs(posterior)
    exact = precision == EXACT
    state, settings = posterior.state, posterior.settings
    tensors, description = posterior.structure.pack(state.curvature, exact)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()}
    tensors |= {name: getattr(settings, name) for name in ("prior_precision", "prior_mean")}
    if state.loss_gradient is not None:
        gradient = state.loss_gradient
        tensors |= {GRADIENT: gradient} if exact else rounded(GRADIENT, gradient)
    if settings.shift is not None:  # in float16 it would move predictions by more than all the rest
        tensors[SHIFT] = settings.shift if exact else settings.shift.float()
    if state.subspace is not None:
        tensors |= subspace_entries(state.subspace)
        if not exact and state.has_subspace:
            del tensors[SUBSPACE_MEAN]  # which is that of the settings
    tensors["sigma_noise"] = torch.as_tensor(settings.sigma_noise).reshape(1)
    uncalibrated, uncalibrated_scales = uncalibrated_entries(settings)
    tensors |= uncalibrated
    config = {
        "version": COMPACT if not exact else VERSION if settings.shift is None else RECENTRED,
        "precision": precision,
        "class": posterior.kind,
        "arguments": posterior.arguments,
        "backend": backend,
        "output": posterior.source.output is not None,
        "scalars": {
            "loss": state.loss,
            "n_data": state.n_data,
            "n_outputs": state.n_outputs,
            MEANS: SECOND,
            **{name: getattr(settings, name) for name in SCALES},
            **uncalibrated_scales,
        },
        "curvature": description,
        TUNING: tuning,
        FURTHER: _further(tensors),
        **identity(posterior),
        BASE_BITS: bits_of(posterior.source),
        BASE_SAMPLES: BaseSamples.of(base_in_use(posterior)).packed(),
        ROUNDED: rounded_fingerprints(trained_tensors(posterior)),
    }
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with together(everyone=is_sharded_model(posterior.source)) as team:
        if not team.shared or is_main():
            write_files(folder, plain, config)


def _check_runs(posterior: Posterior) -> None:
    """Refuse a model in another state than at the fit: by its identity no model would be found."""
    if posterior.last_layer is not None:
        posterior.last_layer.check_adapter()
    else:
        check_runs(posterior.source, posterior.engine.parameters)


def load_state(posterior: Posterior, payload: bytes, config: Mapping[str, Any]) -> PosteriorState:
    """Return the state that files hold, for a posterior around the model they were saved from.

    Args:
        posterior: A new posterior of the class and arguments in the configuration.
        payload: Bytes of the tensors.
        config: The configuration, checked against its hash.

    Raises:
        ValueError: If weights, base model or adapter are others, or the files do not fit together.
        RuntimeError: If the adapter does not run in the model as it is, see `check_runs`.
    """
    _check_runs(posterior)
    try:
        with named_as(config["parameters"]):
            check_identity(config, identity_but_for_rounding(posterior, config), posterior)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as error:
        raise ValueError(f"{CONFIG} is damaged: {error!r}") from None
    try:
        tensors = load(payload)
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"tensor {name!r} is {tensor.dtype}")
        check_finite(tensors)
        _check_further(tensors, config)
        device = posterior.structure.unpack_device(posterior.device)
        return _state(posterior, {name: t.to(device) for name, t in tensors.items()}, config)
    except KeyError as error:
        raise ValueError(f"{TENSORS} does not fit {CONFIG}: {error} is missing") from None
    except (SafetensorError, TypeError, ValueError, IndexError) as error:
        raise ValueError(f"{TENSORS} does not fit {CONFIG}: {error}") from None


def _further(tensors: Iterable[str]) -> list[str]:
    return sorted(name for name in tensors if not name.startswith(PREFIX))


def _check_further(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Refuse tensors that are missing or too many: a posterior without its shift is another one."""
    found = _further(tensors)
    expected = config.get(FURTHER, found)  # earlier versions did not say
    if found != expected:
        raise ValueError(f"there are tensors {found}, and there should be {expected}")


def _state(
    posterior: Posterior, tensors: dict[str, Tensor], config: Mapping[str, Any]
) -> PosteriorState:
    if config["version"] != COMPACT and (config["version"] == RECENTRED) != (SHIFT in tensors):
        raise ValueError(f"version {config['version']} and {SHIFT!r} do not go together")
    packed = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    curvature = posterior.structure.unpack(posterior.engine, packed, config["curvature"])
    if config["version"] == COMPACT and f"{SUBSPACE}grams" in tensors:
        tensors.setdefault(SUBSPACE_MEAN, tensors["prior_mean"])
    tensors["sigma_noise"] = tensors["sigma_noise"].squeeze(0)
    # The subspace's prior mean is compared with that of the settings, bit by bit.
    for name in {*SETTINGS, *UNCALIBRATED_TENSORS, SUBSPACE_MEAN} & set(tensors):
        tensors[name] = tensors[name].to(posterior.device, posterior.dtype)
    weights = posterior.current_weights()
    return replace(
        checked_state(posterior, curvature, weights, tensors, config["scalars"]),
        frozen=frozen_values(posterior.source, posterior.engine.parameters),
        adapter=function_settings(posterior.source),
    )
