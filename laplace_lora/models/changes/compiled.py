"""Compiled modules, run as they were written where hooks must be seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from laplace_lora.models.changes.holders import Holders

COMPILED = "_laplace_lora_compiled"  # where a module keeps what is compiled meanwhile


def _compiled_part(module: Any) -> tuple[str, Any] | None:
    """Return the attribute by which a module is compiled, and what it is as it was written."""
    if type(module).__name__ == "OptimizedModule":  # what `torch.compile` returns
        return "forward", module._orig_mod.__call__
    assigned = vars(module).get("forward")
    if hasattr(assigned, "_torchdynamo_orig_callable"):
        return "forward", assigned._torchdynamo_orig_callable
    if getattr(module, "_compiled_call_impl", None) is not None:
        return "_compiled_call_impl", None
    return None


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module runs compiled, by whichever of torch's ways."""
    return _compiled_part(module) is not None


def _decompile(module: Any) -> None:
    part = _compiled_part(module)
    assert part is not None
    name, written = part
    vars(module)[COMPILED] = name, getattr(module, name)
    object.__setattr__(module, name, written)


def _recompile(module: Any) -> None:
    if COMPILED in vars(module):
        name, compiled = vars(module)[COMPILED]
        object.__setattr__(module, name, compiled)
        del vars(module)[COMPILED]


_EAGER = Holders[nn.Module](_decompile, _recompile)


@contextmanager
def eager(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run compiled modules as they were written, temporarily.

    Compiled code does not look for hooks that were registered after it was made.
    """
    with _EAGER.hold(modules, is_compiled):
        yield


class EagerUntilRemoved:
    """Compiled modules that run as they were written until they are let go, see `eager`."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules

    def start(self) -> None:
        """Run them as they were written from now on."""
        _EAGER.take(self, self._modules, is_compiled)

    def remove(self) -> None:
        """Let them run compiled again; does nothing if that is done."""
        _EAGER.release(self)
