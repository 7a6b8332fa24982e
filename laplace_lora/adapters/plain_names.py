"""Names of tensors as they are without the adapters that are loaded beside the active one."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

_SAVED: ContextVar[Collection[str]] = ContextVar("saved_names", default=())


@contextmanager
def named_as(names: Collection[str]) -> Iterator[None]:
    """Temporarily let `plain_names` call the active adapter what it is called in some names.

    An adapter is often loaded under another name than it was fitted under.

    Args:
        names: Those of a posterior's tensors, as a file has them.
    """
    before = _SAVED.get()
    try:
        _SAVED.set(names)
        yield
    finally:
        _SAVED.set(before)


def adapts(layer: BaseTunerLayer | ModulesToSaveWrapper) -> bool:
    """Return whether an active adapter has tensors of its own in a layer, or a copy of a module.

    PEFT says of all its layers that the same adapter is active.
    """
    return bool(adapters_in(layer) & set(layer.active_adapters))


def adapters_in(layer: BaseTunerLayer | ModulesToSaveWrapper) -> set[str]:
    """Return the adapters, active or idle, that have tensors of their own in a layer."""
    if isinstance(layer, ModulesToSaveWrapper):
        return set(layer.modules_to_save)
    held = (getattr(layer, name, {}) for name in layer.adapter_layer_names)
    return {key for each in held if hasattr(each, "keys") for key in each}


def active_adapters(model: nn.Module) -> set[str]:
    """Return the names of a model's active adapters."""
    adapted = BaseTunerLayer | ModulesToSaveWrapper | PeftModel
    holders = (module for module in model.modules() if isinstance(module, adapted))
    return {adapter for holder in holders for adapter in holder.active_adapters}


def plain_names(model: nn.Module) -> Callable[[str], str]:
    """Return what takes a tensor's name to the one that it has without idle adapters.

    PEFT renames what it puts a layer around: ``k_proj.weight`` to ``k_proj.base_layer.weight``, and
    what it keeps a copy of to ``classifier.original_module.weight``.
    """
    idle = set()
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not adapts(module):
            idle |= {f"{path}.base_layer"}
        elif isinstance(module, ModulesToSaveWrapper):
            if not adapts(module):
                idle |= {f"{path}.original_module"}
        else:  # PEFT's wrapper of an embedding of which some tokens are trained
            inner = getattr(module, "token_adapter", None)
            if isinstance(inner, BaseTunerLayer) and not adapts(inner):
                idle |= {f"{path}.token_adapter"}
    plain = _without(idle)
    return _renamed(plain, _places(model, plain), _SAVED.get()) if _SAVED.get() else plain


def nameless(model: nn.Module) -> Callable[[str], str]:
    """Return what takes the active adapter's name out of `plain_names`, as PEFT's files do."""
    return _without(_places(model, plain_names(model)))


def _places(model: nn.Module, plain: Callable[[str], str]) -> set[str]:
    """Return the plain names of what holds the active adapters' tensors, by their names."""
    active, held = active_adapters(model), []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleDict | nn.ParameterDict | BufferDict):
            held.append((path, set(module.keys())))
        elif isinstance(module, BaseTunerLayer):
            own = vars(module).items()  # what PEFT draws and keeps as no buffer, see `drawn_parts`
            held += [(f"{path}.{name}", set(each)) for name, each in own if isinstance(each, dict)]
    return {plain(f"{path}.{adapter}") for path, keys in held for adapter in active & keys}


def _renamed(
    plain: Callable[[str], str], places: Collection[str], saved: Collection[str]
) -> Callable[[str], str]:
    """Return plain names with the adapter called as in the saved ones; `places` as of `_places`.

    Nothing is renamed where these are of several adapters, or of one of the same name.
    """
    holders = {place.rpartition(".")[0] for place in places}
    parts = (str(name).split(".") for name in saved)
    cut = ((".".join(p[:n]), p[n]) for p in parts for n in range(1, len(p)))
    saved_as = {adapter for holder, adapter in cut if holder in holders}
    if len(saved_as) != 1 or saved_as <= {place.rpartition(".")[2] for place in places}:
        return plain
    (then,) = saved_as

    def renamed(name: str) -> str:
        parts = plain(name).split(".")
        ends = (".".join(parts[: n + 1]) for n in range(len(parts)))
        own = zip(parts, ends, strict=True)
        return ".".join(then if end in places else part for part, end in own)

    return renamed


def _without(paths: Collection[str]) -> Callable[[str], str]:
    """Return what takes the last parts of some paths out of the names that begin with them."""

    def shortened(name: str) -> str:
        parts = name.split(".")
        kept = (p for n, p in enumerate(parts) if ".".join(parts[: n + 1]) not in paths)
        return ".".join(kept)

    return shortened if paths else str
