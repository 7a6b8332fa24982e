"""A posterior's state as a dictionary of tensors and numbers, and back.

For files use `save_pretrained`, which knows the model as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature.kron_protocol import LowRankKron
from laplace_lora.storage.checked import GRADIENT, SHIFT, check_finite, checked_state
from laplace_lora.storage.uncalibrated import (
    UNCALIBRATED_SCALES,
    UNCALIBRATED_TENSORS,
    uncalibrated_entries,
)
from laplace_lora.structures.eigenvalue_correction import CorrectedKron
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.second_means import MEANS, SECOND
from laplace_lora.structures.settings import SCALES, TENSORS, check_positive, copied
from laplace_lora.structures.state import PosteriorState
from laplace_lora.structures.subspace import SUBSPACE, subspace_entries

ENTRIES = ("cls_name", "likelihood", "mean", "H", "temperature", "loss", "n_data", "n_outputs")


def check_entries(state_dict: Mapping[str, Any], names: Iterable[str]) -> None:
    """Refuse a dictionary that is no posterior's, such as a model's.

    Args:
        state_dict: What is to be loaded.
        names: What it must hold.

    Raises:
        ValueError: If it lacks some of them.
    """
    missing = [name for name in names if name not in state_dict]
    if missing:
        raise ValueError(
            f"the dictionary has no {', '.join(map(repr, missing[:3]))}; load what a posterior's "
            "state_dict() returned"
        )


def state_entries(posterior: Posterior) -> dict[str, Any]:
    """Return what a state dictionary holds beside laplace-torch's own entries."""
    structure, curvature = posterior.structure, posterior.state.curvature
    raw = structure.raw(curvature)
    packed = raw if isinstance(raw, Tensor) else structure.pack(curvature)
    state = posterior.state
    uncalibrated, uncalibrated_scales = uncalibrated_entries(state.settings)
    return {
        "H": packed,
        MEANS: SECOND,
        GRADIENT: state.loss_gradient,
        **({} if state.subspace is None else subspace_entries(state.subspace)),
        **{name: getattr(posterior.settings, name) for name in SCALES},
        **{name: copied(getattr(posterior.settings, name)) for name in TENSORS},
        SHIFT: posterior.settings.shift,
        **uncalibrated,
        **uncalibrated_scales,
    }


def read_state(posterior: Posterior, state_dict: Mapping[str, Any]) -> PosteriorState:
    """Return the state that a dictionary holds.

    Args:
        posterior: A posterior of the same class and arguments, at the same weights.
        state_dict: From `state_entries` and laplace-torch; dictionaries of earlier versions, which
            held objects, are understood.

    Raises:
        ValueError: If the dictionary lacks an entry, is of another class, likelihood, number of
            weights or kind of eigenvalues, or a value is impossible, such as a negative curvature.
    """
    check_entries(state_dict, ENTRIES)
    if state_dict["cls_name"] != posterior.kind:
        raise ValueError(
            f"the state is that of a {state_dict['cls_name']}, not of a {posterior.kind}"
        )
    if state_dict["likelihood"] != posterior.objective.name:
        raise ValueError(
            f"the state is of the likelihood {state_dict['likelihood']!r}, not of "
            f"{posterior.objective.name!r}"
        )
    mean, n = state_dict["mean"], sum(posterior.engine.sizes)
    if len(mean) != n:
        raise ValueError(f"the state has {len(mean)} weights, the model trains {n}")
    of_subspace = (name for name in state_dict if name.startswith(SUBSPACE))
    named = (*TENSORS, *UNCALIBRATED_TENSORS, SHIFT, GRADIENT, *of_subspace)
    given = {name: state_dict[name] for name in named if state_dict.get(name) is not None}
    tensors = {name: torch.as_tensor(value) for name, value in given.items()}
    check_finite({"mean": mean, **tensors})
    check_positive("temperature", state_dict["temperature"])
    loss = state_dict["loss"]
    numbers = {
        **{name: state_dict.get(name, 1.0) for name in SCALES},
        **{name: state_dict[name] for name in UNCALIBRATED_SCALES if name in state_dict},
        **{name: state_dict[name] for name in ("n_data", "n_outputs")},
        MEANS: state_dict.get(MEANS),
        "loss": float(loss) if isinstance(loss, int | Tensor) else loss,
    }
    return checked_state(posterior, _curvature(posterior, state_dict), mean, tensors, numbers)


def _curvature(posterior: Posterior, state_dict: Mapping[str, Any]) -> Any:
    structure, engine, packed = posterior.structure, posterior.engine, state_dict["H"]
    if isinstance(packed, Tensor):
        return structure.ready(engine, packed)
    if isinstance(packed, tuple):
        check_finite(packed[0])
        return structure.unpack(engine, *packed)
    residual = structure.arguments()["residual"]  # lists of factors, of earlier versions
    factors = LowRankKron(packed, residual)
    eigen = state_dict.get("H_corrected")
    return structure.ready(engine, factors if eigen is None else CorrectedKron(factors, eigen))
