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
        undo: Changes it back; does nothing to an object that is not changed.
    """

    def __init__(self, change: Callable[[T], None], undo: Callable[[T], None]) -> None:
        self._change, self._undo = change, undo
        self._lock = threading.RLock()
        self._held: dict[int, tuple[T, frozenset[object]]] = {}  # objects, and by whom
        _EVERY.append(self)

    @contextmanager
    def hold(self, objects: Sequence[T], needs_change: Callable[[T], bool]) -> Iterator[None]:
        """Hold those objects that need the change, or that another thread has changed already."""
        holder = object()
        try:
            self.take(holder, objects, needs_change)
            yield
        finally:
            # Twice: an interrupt can break one of the two, and each is able to finish the other's
            # work, as what is held is noted before it is changed, until after it is changed back.
            try:
                self.release(holder)
            finally:
                self.release(holder)

    def take(self, holder: object, objects: Sequence[T], needs_change: Callable[[T], bool]) -> None:
        """Let a holder hold objects until `release`, as `hold` does for a block."""
        with self._lock:
            for item in objects:
                needs = needs_change(item)
                if needs or id(item) in self._held:
                    holders = self._held.get(id(item), (item, frozenset()))[1]
                    self._held[id(item)] = (item, holders | {holder})
                if needs:  # whoever holds it: the user may have changed it back
                    self._change(item)

    def release(self, holder: object) -> None:
        """Undo the change of what nobody else holds; does nothing if that is done."""
        with self._lock:
            for item, holders in list(self._held.values()):
                if holders == {holder}:
                    self._undo(item)
                    del self._held[id(item)]
                elif holder in holders:
                    self._held[id(item)] = (item, holders - {holder})

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
