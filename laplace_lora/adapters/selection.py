"""Select trainable tensors by the names of their modules."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from laplace_lora.adapters.peft_state import adapter_parameters
from laplace_lora.adapters.plain_names import named_as, plain_names

_LEFT_OUT: ContextVar[frozenset[int]] = ContextVar("left_out", default=frozenset())
_SAVED: ContextVar[frozenset[str]] = ContextVar("saved", default=frozenset())


@contextmanager
def covering(names: Iterable[str]) -> Iterator[None]:
    """Temporarily let `trainable_only` leave out what is not among the names of some tensors.

    It leaves out no tensor of the base model, and nothing at all if one of the names is of nothing
    trainable: that is another model.

    Args:
        names: As PEFT has them, or those without idle adapters, see `plain_names`.
    """
    before = _SAVED.get()
    try:
        _SAVED.set(frozenset(names))
        yield
    finally:
        _SAVED.set(before)


def is_chosen() -> bool:
    """Return whether `covering` says what a posterior covers."""
    return bool(_SAVED.get())


@contextmanager
def trainable_only(model: nn.Module, modules: str | Sequence[str] | None) -> Iterator[None]:
    """Temporarily leave out all trainable tensors but those of some modules, see `is_trained`.

    The tensors themselves stay as they are: other threads may need their gradients.

    Args:
        model: Any module.
        modules: A regular expression searched for in the modules' names, a list of names or of
            whole parts of them, or ``None`` for all.

    Raises:
        ValueError: If no trainable module matches, or none matches a name of the list; lists the
            trainable ones.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    owners = {name: name.rpartition(".")[0] for name in trainable}
    others = [p for name, p in trainable.items() if not _matches(owners[name], modules)]
    # Earlier versions saved lists with names that match nothing.
    idle = [] if is_chosen() else _idle(owners.values(), modules)
    if trainable and (idle or len(others) == len(trainable)):
        modules = idle or modules
        raise ValueError(
            f"modules={modules!r} matches no trainable module; there are "
            f"{listed(sorted(set(owners.values())))}"
        )
    others += _unsaved(model, trainable)
    before = _LEFT_OUT.get()
    try:
        _LEFT_OUT.set(frozenset(map(id, others)))
        yield
    finally:
        _LEFT_OUT.set(before)


def is_trained(parameter: nn.Parameter) -> bool:
    """Return whether a tensor is trainable and not left out by `trainable_only`."""
    return parameter.requires_grad and id(parameter) not in _LEFT_OUT.get()


def _unsaved(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> list[nn.Parameter]:
    """Return what is trainable of an adapter and no name of `covering` is of.

    A file tells the adapter's values apart exactly, those of the base model by samples.
    """
    saved = _SAVED.get()
    if not saved:
        return []
    with named_as(saved):
        plain = plain_names(model)
    for name_of in (plain, str):
        if saved <= set(map(name_of, trainable)):
            others = [p for name, p in trainable.items() if name_of(name) not in saved]
            of_adapters = adapter_parameters(model)
            return [p for p in others if id(p) in of_adapters]
    return []


def _matches(name: str, modules: str | Sequence[str] | None) -> bool:
    if modules is None:
        return True
    if isinstance(modules, str):
        return re.search(modules, name) is not None
    return any(f".{part}." in f".{name}." for part in modules)


def _idle(names: Collection[str], modules: str | Sequence[str] | None) -> list[str]:
    """Return the entries of a list that match no name."""
    parts = [] if modules is None or isinstance(modules, str) else modules
    return [part for part in parts if not any(_matches(name, [part]) for name in names)]


def listed(names: Sequence[str], at_most: int = 5) -> str:
    """Return the first names, quoted, and the number of others."""
    shown = ", ".join(map(repr, names[:at_most]))
    return shown if len(names) <= at_most else f"{shown} and {len(names) - at_most} more"
