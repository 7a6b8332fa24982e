"""`Holders`: changes of shared objects, made by the first thread that needs them.

Several threads may hold the same change at once: it is undone by the last.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_EVERY: list[Holders[Any]] = []


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
