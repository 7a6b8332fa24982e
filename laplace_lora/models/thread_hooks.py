"""Hooks that act in the thread that registered them only.

A posterior may answer in many threads at once, and its user may run the model beside it: a hook
must neither record nor change another thread's forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

# Held while modules change: torch numbers hooks with a counter that two threads may read at once,
# and a model that is being copied must keep still.
STRUCTURE = threading.RLock()
_SUSPENDED = threading.local()


class _Own:
    """A hook that runs what it is given in one thread, until it is stopped.

    A copy of its module has the same hook, which then must not act for good.

    Args:
        hook: From arguments to others, or to ``None``.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self._hook: Callable[..., Any] | None = hook
        self._owner = threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # torch asks whether a hook takes keywords when it calls it. By then another thread may have
        # removed its hook, and the call comes without: hence `rest`.
        if self._hook is None or not _acts_for(self._owner):
            return None
        return self._hook(args, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Own:
        return self

    def stop(self) -> None:
        """Do nothing from now on, and keep nothing in memory."""
        self._hook = None


class Handle:
    """A registered hook, which can be removed."""

    def __init__(self, own: _Own, handle: RemovableHandle) -> None:
        self._own, self._handle = own, handle

    def remove(self) -> None:
        """Remove the hook from its module."""
        self._own.stop()
        with STRUCTURE:
            self._handle.remove()


def remove_copied(modules: Iterable[nn.Module]) -> None:
    """Remove the hooks from copies of modules that threads were running when they were copied.

    Args:
        modules: The copies.
    """
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, _Own):
                    del hooks[key]


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
    own = _Own(hook)
    with STRUCTURE:
        return Handle(own, module.register_forward_pre_hook(own, with_kwargs=True))


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
    own = _Own(hook)
    with STRUCTURE:
        return Handle(own, module.register_forward_hook(own, with_kwargs=True, prepend=first))
