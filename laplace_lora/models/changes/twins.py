"""`resampled`: a model whose trainable weights may be overwritten while others use the model."""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor, nn

from laplace_lora.data.sharding import gathered_anew, is_sharded_model
from laplace_lora.models.changes.compiled import is_compiled
from laplace_lora.models.changes.modes import weights_kept
from laplace_lora.models.changes.thread_hooks import STRUCTURE
from laplace_lora.models.changes.turns import in_turn

logger = logging.getLogger(__name__)

# Models that cannot be copied change in place, one thread after the other.
_IN_PLACE = threading.RLock()


@contextmanager
def resampled(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> Iterator[tuple[nn.Module, list[nn.Parameter]]]:
    """Yield a twin of a model, and its trainable tensors, which may be overwritten.

    The twin has modules and trainable tensors of its own and shares all other weights, so the
    model itself runs on unchanged, in other threads as well. Models that are compiled, offloaded or
    sharded, or whose forward pass was replaced by a function that holds the model, cannot have one:
    they are yielded themselves and get their weights back to the bit; other threads' samples wait
    meanwhile, and a plain forward pass beside them sees sampled weights.

    Args:
        model: Any module, in the mode in which it is to run.
        parameters: Its tensors to overwrite.
    """
    twin, twins = twin_of(model, parameters)
    if twin is not None:
        yield twin, twins
        return
    with in_place(model, parameters):
        yield model, list(parameters)


@contextmanager
def in_place(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let a model's own weights be overwritten temporarily, by one thread after the other.

    Args:
        model: Any module.
        parameters: The tensors that come back to the bit.
    """
    with _IN_PLACE, gathered_anew(model), weights_kept(parameters):
        yield


def twin_of(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> tuple[nn.Module | None, list[nn.Parameter]]:
    """Return a twin and its own tensors; ``None`` if the model cannot have one, see `resampled`.

    Args:
        model: Any module.
        parameters: The tensors of which the twin has its own.
    """
    with in_turn(model):
        return _twin_of(model, parameters)


def _twin_of(
    model: nn.Module, parameters: Sequence[nn.Parameter]
) -> tuple[nn.Module | None, list[nn.Parameter]]:
    if not _has_twin(model):
        return None, []
    own = {id(parameter) for parameter in parameters}
    shared: list[object] = [p for p in (*model.parameters(), *model.buffers()) if id(p) not in own]
    for module in model.modules():  # bitsandbytes keeps 8-bit weights in an object of its own
        shared += [v for v in vars(module).values() if type(v).__name__ == "MatmulLtState"]
        shared += _derived(vars(module).get("kwargs"))
    memo: dict[int, Any] = {id(item): item for item in shared}
    try:
        with STRUCTURE:
            twin = copy.deepcopy(model, memo)
    except Exception as error:  # whatever the user's own modules raise
        logger.info("sampling weights in place: %s", error)
        return None, []
    for module in twin.modules():
        if _is_trls_fused_head(module):
            del module.forward  # which is the class's own, unless the fused head is asked for
    return twin, [memo[id(parameter)] for parameter in parameters]


def _derived(value: Any) -> list[Tensor]:
    """Return tensors that come of others, which torch does not copy.

    PEFT keeps such views of tied weights among the arguments that a layer was made with, and never
    reads them again. Elsewhere such a tensor is a state, of which a copy cannot be trusted.
    """
    if isinstance(value, Tensor):
        return [] if value.is_leaf else [value]
    return [t for v in value.values() for t in _derived(v)] if isinstance(value, dict) else []


def _has_twin(model: nn.Module) -> bool:
    for module in model.modules():
        if is_compiled(module) or getattr(getattr(module, "_hf_hook", None), "offload", False):
            return False
        # A copy's forward pass would run the modules that are in the closure: the model's own.
        is_changed = "forward" in vars(module) and not _is_trls_fused_head(module)
        if is_changed and _holds_modules(module.forward, set()):
            return False
    at_hand = all(parameter.device.type != "meta" for parameter in model.parameters())
    return at_hand and not is_sharded_model(model)


def _is_trls_fused_head(module: nn.Module) -> bool:
    """Return whether TRL has put a forward pass around the class's own, see `_fused_forward`.

    Every trainer of the same model puts another one around it.
    """
    forward, is_fused = vars(module).get("forward"), False
    while True:
        function: Any = getattr(forward, "__func__", None)
        code = getattr(function, "__code__", None)
        if code is None or code.co_name != "_fused_forward":
            return is_fused and function is type(module).forward
        inner = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        forward = inner["original_forward"].cell_contents if "original_forward" in inner else None
        is_fused = True


def _holds_modules(function: Any, seen: set[int]) -> bool:
    """Return whether a function refers to modules, or to methods of theirs, in its closure."""
    function = getattr(function, "__func__", getattr(function, "func", function))
    if id(function) in seen:
        return False
    seen.add(id(function))
    contents = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            contents.append(cell.cell_contents)
    contents += [v for c in contents if not isinstance(c, nn.Module | type) for v in _parts(c)]
    return any(
        isinstance(content, nn.Module)
        or isinstance(getattr(content, "__self__", None), nn.Module)
        or (callable(content) and not isinstance(content, type) and _holds_modules(content, seen))
        for content in contents
    )


def _parts(content: Any) -> list[Any]:
    return list(vars(content).values()) if hasattr(content, "__dict__") else []
