"""How a batch's outputs change along directions of the weights, by forward mode.

A direction costs about as much as one and a half forward passes, however many classes there are; a
backward pass gives the derivatives of one contrast along all directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.pairs import passes
from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.links import check_finite
from laplace_lora.models.changes.autocast import as_called
from laplace_lora.models.changes.modes import coarsest_dtype, evaluation_mode
from laplace_lora.models.tangents.forward_mode import NoForwardDerivativeError, forward_mode
from laplace_lora.models.tolerances import near
from laplace_lora.structures.posterior import Posterior

CROSSOVER = 1.5  # contrasts that cost as much as a direction, see benchmarks/speed/classes.py
AT_ONCE = 16  # directions
ROOM = 2**16  # tokens times directions that are in memory at once


class OtherOutputsError(RuntimeError):
    """A model has other outputs where it carries tangents than by itself."""


@torch.no_grad()
def tangents_along(
    posterior: Posterior, x: Any, readout: Readout, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """Return functions of a batch's outputs at the trained weights, and their derivatives.

    Args:
        posterior: Whose model is meant.
        x: Batch that the model takes.
        readout: The functions.
        directions: Flat, in the order of the trainable tensors, ``(directions, parameters)``.

    Returns:
        The functions ``(batch, columns)``, and ``(directions, batch, columns)``.

    Raises:
        NoForwardDerivativeError: If the model cannot carry tangents, or they overflow.
        OtherOutputsError: If its values beside tangents are others than without.
        FloatingPointError: If the outputs are not finite; names the rows.
    """
    model, slopes = posterior.model, []
    at_once = max(1, min(AT_ONCE, ROOM // _tokens(x)))
    with evaluation_mode(model):
        with as_called():
            own, dtype = model(x), coarsest_dtype(model)
        check_finite(own)
        with forward_mode(model, posterior.engine.parameters, directions) as forward:
            for part in forward.parts(at_once):
                with as_called():
                    values, tangents = part.run({"batch": x}, lambda f: {"f": f})
                slopes.append(tangents["f"].to(posterior.dtype))
    if not near(values["f"], own, dtype):
        raise OtherOutputsError(
            "the model has other outputs where it carries tangents than by itself; use "
            "method='exact'"
        )
    if not all(bool(part.isfinite().all()) for part in slopes):
        raise NoForwardDerivativeError(
            "tangents are not finite where outputs are: they exceed the range of "
            f"{str(dtype).removeprefix('torch.')}"
        )
    moved = [readout.mean(slope) for part in slopes for slope in part]
    return readout.mean(own), torch.stack(moved)


def tangents_are_cheaper(posterior: Posterior, directions: int) -> bool:
    """Return whether some directions cost less than the backward passes of all contrasts.

    Those of a last layer alone cost next to nothing.
    """
    if posterior.differentiable or posterior.last_layer is not None:
        return False
    return posterior.objective.n_columns(posterior.state.n_outputs) > CROSSOVER * directions


def _tokens(x: Any) -> int:
    """Return about how many tokens a batch has."""
    parts = [v for p in passes(x) for v in (p.values() if isinstance(p, Mapping) else [p])]
    tensors = [v for v in parts if isinstance(v, Tensor) and v.ndim > 1]
    # Ids may stand in choices; the last dimensions of images and waves are no tokens.
    sizes = [v.shape[:2].numel() if v.is_floating_point() else v.numel() for v in tensors]
    return max(sizes, default=1)
