"""Context managers that temporarily change a model and always restore it.

Several threads may hold the same change at once: it is made by the first and undone by the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

import torch
from peft.tuners.lora import dora
from torch import Tensor, nn

from laplace_lora.data.sharding import write_values
from laplace_lora.models.turns import in_turn

T = TypeVar("T")
_EVERY: list[Holders[Any]] = []
COMPILED = "_laplace_lora_compiled"  # where a module keeps its compiled call meanwhile


class Holders(Generic[T]):
    """Objects that one or more threads hold in a changed state.

    Args:
        change: Changes an object.
        undo: Changes it back.
    """

    def __init__(self, change: Callable[[T], None], undo: Callable[[T], None]) -> None:
        self._change, self._undo = change, undo
        self._lock = threading.RLock()
        self._held: dict[int, tuple[T, int]] = {}
        _EVERY.append(self)

    @contextmanager
    def hold(self, objects: Sequence[T], needs_change: Callable[[T], bool]) -> Iterator[None]:
        """Hold those objects that need the change, or that another thread has changed already."""
        taken: list[T] = []
        try:
            with self._lock:
                for item in objects:
                    holders = self._held.get(id(item), (item, 0))[1]
                    if holders == 0 and not needs_change(item):
                        continue
                    if holders == 0:
                        self._change(item)
                    self._held[id(item)] = (item, holders + 1)
                    taken.append(item)
            yield
        finally:
            with self._lock:
                for item in taken:
                    holders = self._held.pop(id(item))[1] - 1
                    if holders:
                        self._held[id(item)] = (item, holders)
                    else:
                        self._undo(item)

    @contextmanager
    def undone_in(self, copies: Mapping[int, Any]) -> Iterator[None]:
        """Let nothing change while objects are copied; what has is undone in the copies.

        Args:
            copies: By the originals' ``id``, as `copy.deepcopy` fills its ``memo``.
        """
        with self._lock:
            yield
            for original, _ in self._held.values():
                twin = copies.get(id(original), original)
                if twin is not original:
                    self._undo(twin)


@contextmanager
def undone_in(copies: Mapping[int, Any]) -> Iterator[None]:
    """Let copies be made as if no thread held any of the originals, see `Holders.undone_in`."""
    with ExitStack() as stack:
        for holders in _EVERY:
            stack.enter_context(holders.undone_in(copies))
        yield


def _switched(name: str, value: bool) -> Holders[Any]:
    """Return holders of objects with an attribute that is true or false, switched to a value."""
    return Holders(lambda x: setattr(x, name, value), lambda x: setattr(x, name, not value))


def _decompile(module: Any) -> None:
    if _is_wrapper(module):
        vars(module)[COMPILED] = module.forward
        object.__setattr__(module, "forward", module._orig_mod.__call__)
    elif _has_compiled_pass(module):
        vars(module)[COMPILED] = module.forward
        module.forward = module.forward._torchdynamo_orig_callable
    else:
        vars(module)[COMPILED] = module._compiled_call_impl
        module._compiled_call_impl = None


def _recompile(module: Any) -> None:
    compiled = vars(module).pop(COMPILED)
    if _is_wrapper(module):
        object.__setattr__(module, "forward", compiled)
    elif "forward" in vars(module):
        module.forward = compiled
    else:
        module._compiled_call_impl = compiled


def _is_wrapper(module: nn.Module) -> bool:
    """Return whether a module is what ``torch.compile`` returns."""
    return type(module).__name__ == "OptimizedModule"


def _has_compiled_pass(module: nn.Module) -> bool:
    """Return whether a module's forward pass was compiled by itself, and assigned to it."""
    return hasattr(vars(module).get("forward"), "_torchdynamo_orig_callable")


_EAGER = Holders[nn.Module](_decompile, _recompile)
_EVALUATING = _switched("training", False)
_DIFFERENTIABLE = _switched("training", True)
_UNCACHED = _switched("ENABLE_DORA_CACHING", False)
_THAWED = _switched("requires_grad", True)


def device_of(model: nn.Module) -> torch.device:
    """Return where a model takes its inputs: the device of the first parameter.

    Parameters that are offloaded are on none.
    """
    devices = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(devices, torch.device("meta"))


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """Return the coarsest dtype in which a model computes; bfloat16 if it is quantised."""
    if torch.is_autocast_enabled(device_of(model).type):
        return torch.bfloat16
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if not all(dtype.is_floating_point for dtype in dtypes):
        return torch.bfloat16
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; each module's own mode comes back afterwards.

    Gradients flow all the same, see `differentiable`. While one thread holds the mode, other
    threads' forward passes run in it, too.
    """
    with in_turn(model):
        modules = list(model.modules())
        others = [module for module in modules if not _is_four_bit(module)]
        with (
            _EVALUATING.hold(others, lambda module: module.training),
            differentiable(modules),
            _norms_anew(modules),
        ):
            yield


@contextmanager
def _norms_anew(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let DoRA compute its norms in each pass, temporarily, where `peft.helpers.DoraCaching` is on.

    In evaluation mode it keeps those of the first pass otherwise, whatever becomes of the weights.
    """
    for layer in modules:
        if isinstance(layer, dora.DoraLinearLayer):
            layer._cache_clear()  # parts of a graph, which cannot be copied
    with _UNCACHED.hold([dora], lambda module: module.ENABLE_DORA_CACHING):
        yield


@contextmanager
def differentiable(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Let gradients flow through bitsandbytes' 4-bit layers temporarily, in evaluation mode.

    On processors with AVX512-BF16 these layers pack their weights anew when they first run without
    gradient in evaluation mode, and have no gradient from then on. That is all the mode means to
    them, so they are put in training mode; writing their state out brings the first packing back.

    Args:
        modules: All modules of the model.
    """
    layers: list[Any] = [module for module in modules if _is_four_bit(module)]
    for layer in layers:
        if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
            layer.state_dict()
    with _DIFFERENTIABLE.hold(layers, lambda layer: not layer.training):
        yield


def _is_four_bit(module: nn.Module) -> bool:
    return type(module).__name__ == "Linear4bit"


@contextmanager
def eager(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled modules as they were written, temporarily.

    Compiled code does not look for hooks that were registered after it was made.

    Args:
        modules: All modules of the model.
    """

    def is_compiled(module: nn.Module) -> bool:
        called = getattr(module, "_compiled_call_impl", None) is not None
        return _is_wrapper(module) or _has_compiled_pass(module) or called

    with _EAGER.hold(modules, is_compiled):
        yield


@contextmanager
def gradients_needed(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let frozen floating-point tensors take part in a graph; they are frozen again afterwards."""
    floating = [p for p in parameters if p.is_floating_point()]
    with _THAWED.hold(floating, lambda p: not p.requires_grad):
        yield


@contextmanager
def weights_kept(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let the weights be overwritten; they come back to the bit afterwards."""
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def set_weights(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Write a flat vector into parameters, in their own dtype.

    Args:
        parameters: The tensors to overwrite, in the order of the vector.
        vector: New values, shape ``(parameters,)``.
    """
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, values in zip(parameters, vector.split(sizes), strict=True):
        write_values(parameter, values.view(parameter.shape))
