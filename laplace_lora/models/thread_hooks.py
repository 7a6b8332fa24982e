"""Hooks that act in the thread that registered them only.

A posterior may answer in many threads at once, and its user may run the model beside it: a hook
must neither record nor change another thread's forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# Held while modules change: torch numbers hooks with a counter that two threads may read at once,
# and a model that is being copied must keep still.
STRUCTURE = threading.RLock()
_SUSPENDED = threading.local()


class Handle:
    """A registered hook, which can be removed."""

    def __init__(self, handle: RemovableHandle) -> None:
        self._handle = handle

    def remove(self) -> None:
        """Remove the hook from its module."""
        with STRUCTURE:
            self._handle.remove()


@contextmanager
def hooks_suspended() -> Iterator[None]:
    """Let forward passes of the current thread run as if there were none of these hooks."""
    before = getattr(_SUSPENDED, "yes", False)
    _SUSPENDED.yes = True
    try:
        yield
    finally:
        _SUSPENDED.yes = before


def _acts_for(owner: int) -> bool:
    return threading.get_ident() == owner and not getattr(_SUSPENDED, "yes", False)


def on_input(
    module: nn.Module,
    hook: Callable[
        [tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None
    ],
) -> Handle:
    """Register a pre-hook for forward passes of the current thread.

    Args:
        module: Any module.
        hook: From positional and keyword arguments to others, or to ``None`` to keep them.
    """
    owner = threading.get_ident()

    def own(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # torch asks whether a hook takes keywords when it calls it. By then another thread may have
        # removed its hook, and the call comes without: hence `rest`.
        return hook(args, *rest) if _acts_for(owner) else None

    with STRUCTURE:
        return Handle(module.register_forward_pre_hook(own, with_kwargs=True))


def on_output(
    module: nn.Module,
    hook: Callable[[tuple[Any, ...], dict[str, Any], Any], Any],
    first: bool = False,
) -> Handle:
    """Register a forward hook for forward passes of the current thread.

    Args:
        module: Any module.
        hook: From arguments, keyword arguments and output to another output, or to ``None`` to keep
            it.
        first: Before all hooks of the module, which may replace its output.
    """
    owner = threading.get_ident()

    def own(module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        return hook(args, *rest) if _acts_for(owner) else None

    with STRUCTURE:
        return Handle(module.register_forward_hook(own, with_kwargs=True, prepend=first))
