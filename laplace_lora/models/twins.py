"""`resampled`: a model whose trainable weights may be overwritten while others use the model."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from laplace_lora.models.modes import weights_kept
from laplace_lora.models.thread_hooks import STRUCTURE

logger = logging.getLogger(__name__)

# Models that cannot be copied change in place, one thread after the other.
_IN_PLACE = threading.RLock()


@contextmanager
def resampled(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield a twin of a model, and its trainable tensors, which may be overwritten.

    The twin has modules and trainable tensors of its own and shares all other weights, so the
    model itself runs on unchanged, in other threads as well. Models that are compiled or offloaded
    cannot have one: they are yielded themselves and get their weights back to the bit; other
    threads' samples wait meanwhile, and a plain forward pass beside them sees sampled weights.

    Args:
        model: Any module, in the mode in which it is to run.
        parameters: Its tensors to overwrite.
    """
    twin, twins = twin_of(model, parameters)
    if twin is not None:
        yield twin, twins
        return
    with _IN_PLACE, weights_kept(parameters):
        yield model, list(parameters)


def twin_of(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> tuple[nn.Module | None, list[nn.Parameter]]:
    """Return a twin and its own tensors; ``None`` if the model cannot have one, see `resampled`.

    Args:
        model: Any module.
        parameters: The tensors of which the twin has its own.
    """
    if not _has_twin(model):
        return None, []
    own = {id(parameter) for parameter in parameters}
    shared: list[object] = [p for p in (*model.parameters(), *model.buffers()) if id(p) not in own]
    for module in model.modules():  # bitsandbytes keeps 8-bit weights in an object of its own
        shared += [v for v in vars(module).values() if type(v).__name__ == "MatmulLtState"]
    memo: dict[int, Any] = {id(item): item for item in shared}
    try:
        with STRUCTURE:
            twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's own modules raise
        logger.info("sampling weights in place: %s", error)
        return None, []
    return twin, [memo[id(parameter)] for parameter in parameters]


def _has_twin(model: nn.Module) -> bool:
    for module in model.modules():
        compiled = type(module).__name__ == "OptimizedModule" or module._compiled_call_impl
        if compiled or getattr(getattr(module, "_hf_hook", None), "offload", False):
            return False
    return all(parameter.device.type != "meta" for parameter in model.parameters())
