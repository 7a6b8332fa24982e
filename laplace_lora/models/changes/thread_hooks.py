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
    """A registered hook: runs an action in one thread, for as long as there is the action.

    A copy of its module has the same hook, which then must not act for good.

    Args:
        actions: Those of hooks that are removed together; each from arguments to others, or to
            ``None``.
        number: The action's.
    """

    def __init__(self, actions: dict[int, Callable[..., Any]], number: int) -> None:
        self._actions, self._number = actions, number
        self._owner = threading.get_ident()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
        # torch asks whether a hook takes keywords when it calls it. By then another thread may have
        # removed its hook, and the call comes without: hence `rest`.
        action = self._actions.get(self._number)
        is_elsewhere = threading.get_ident() != self._owner
        if action is None or is_elsewhere or getattr(_SUSPENDED, "yes", False):
            return None
        return action(args, *rest)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Own:
        return self


class OwnHooks:
    """Hooks for forward passes of the current thread, which are removed together."""

    def __init__(self) -> None:
        self._actions: dict[int, Callable[..., Any]] = {}
        self._handles: list[RemovableHandle] = []

    def on_input(
        self,
        module: nn.Module,
        hook: Callable[
            [tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None
        ],
    ) -> None:
        """Register a pre-hook.

        Args:
            module: Any module.
            hook: From positional and keyword arguments to others, or to ``None`` to keep them.
        """
        with STRUCTURE:
            own = self._own(hook)
            self._handles.append(module.register_forward_pre_hook(own, with_kwargs=True))

    def on_output(
        self,
        module: nn.Module,
        hook: Callable[[tuple[Any, ...], dict[str, Any], Any], Any],
        first: bool = False,
    ) -> None:
        """Register a forward hook.

        Args:
            module: Any module.
            hook: From arguments, keyword arguments and output to another output, or to ``None`` to
                keep it.
            first: Before all hooks of the module, which may replace its output.
        """
        with STRUCTURE:
            own = self._own(hook)
            handle = module.register_forward_hook(own, with_kwargs=True, prepend=first)
            self._handles.append(handle)

    def remove(self) -> None:
        """Remove the hooks from their modules; does nothing if that is done."""
        # One step takes all actions away: a hook that an interrupt leaves behind does nothing, and
        # keeps nothing in memory.
        self._actions.clear()
        with STRUCTURE:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def _own(self, action: Callable[..., Any]) -> _Own:
        number = len(self._actions)
        self._actions[number] = action
        return _Own(self._actions, number)


@contextmanager
def own_hooks() -> Iterator[OwnHooks]:
    """Yield hooks of the current thread that are removed after this block."""
    hooks = OwnHooks()
    try:
        yield hooks
    finally:
        # Twice, as everywhere a shared object is put back: an interrupt can break one of the two.
        try:
            hooks.remove()
        finally:
            hooks.remove()


def remove_copied(modules: Iterable[nn.Module]) -> None:
    """Remove the hooks from copies of modules that threads were running when they were copied."""
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
