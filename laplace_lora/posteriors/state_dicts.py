"""A posterior's state as a dictionary of tensors and numbers, and back.

For files use `save_pretrained`, which knows the model as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.curvature.kron_protocol import LowRankKron
from laplace_lora.structures.eigenvalue_correction import CorrectedKron
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import SCALES, TENSORS, Settings, copied
from laplace_lora.structures.state import PosteriorState
from laplace_lora.structures.subspace import SUBSPACE, SUBSPACE_TENSORS, subspace_from

SHIFT = "shift"


def state_entries(posterior: Posterior) -> dict[str, Any]:
    """Return what a state dictionary holds beside laplace-torch's own entries.

    Args:
        posterior: A fitted posterior.
    """
    structure, curvature = posterior.structure, posterior.state.curvature
    raw = structure.raw(curvature)
    packed = raw if isinstance(raw, Tensor) else structure.pack(curvature)
    state = posterior.state
    gradient: dict[str, Any] = {"loss_gradient": state.loss_gradient}
    if state.subspace is not None:
        gradient |= {f"{SUBSPACE}{n}": getattr(state.subspace, n) for n in SUBSPACE_TENSORS}
    return {
        "H": packed,
        **gradient,
        **{name: getattr(posterior.settings, name) for name in SCALES},
        **{name: copied(getattr(posterior.settings, name)) for name in TENSORS},
        SHIFT: posterior.settings.shift,
    }


def read_state(posterior: Posterior, state_dict: Mapping[str, Any]) -> PosteriorState:
    """Return the state that a dictionary holds.

    Args:
        posterior: A posterior of the same class and arguments, at the same weights.
        state_dict: From `state_entries` and laplace-torch; dictionaries of earlier versions, which
            held objects, are understood.

    Raises:
        ValueError: If the dictionary is of another class, likelihood, number of weights or kind of
            eigenvalues.
    """
    if state_dict["cls_name"] != posterior.kind:
        raise ValueError(
            f"the state is that of a {state_dict['cls_name']}, not of a {posterior.kind}"
        )
    if state_dict["likelihood"] != posterior.objective.name:
        raise ValueError(
            f"the state is of the likelihood {state_dict['likelihood']!r}, not of "
            f"{posterior.objective.name!r}"
        )
    sizes = tuple(posterior.engine.sizes)
    if len(state_dict["mean"]) != sum(sizes):
        raise ValueError(
            f"the state has {len(state_dict['mean'])} weights, the model trains {sum(sizes)}"
        )
    settings = Settings(
        state_dict["prior_precision"],
        state_dict["prior_mean"],
        torch.as_tensor(state_dict["sigma_noise"]),
        shift=state_dict.get(SHIFT),
        **{name: state_dict.get(name, 1.0) for name in SCALES},
    )
    return PosteriorState(
        settings=settings.own(),
        curvature=_curvature(posterior, state_dict),
        mean=state_dict["mean"],
        sizes=sizes,
        loss=state_dict["loss"],
        n_data=state_dict["n_data"],
        n_outputs=state_dict["n_outputs"],
        loss_gradient=state_dict.get("loss_gradient"),
        subspace=subspace_from(state_dict),
    )


def _curvature(posterior: Posterior, state_dict: Mapping[str, Any]) -> Any:
    structure, engine, packed = posterior.structure, posterior.engine, state_dict["H"]
    if isinstance(packed, Tensor):
        return structure.ready(engine, packed)
    if isinstance(packed, tuple):
        return structure.unpack(engine, *packed)
    residual = structure.arguments()["residual"]  # lists of factors, of earlier versions
    factors = LowRankKron(packed, residual)
    eigen = state_dict.get("H_corrected")
    return structure.ready(engine, factors if eigen is None else CorrectedKron(factors, eigen))
