"""Several loaders as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from laplace_lora.data.distributed import is_sharded


@dataclass(frozen=True)
class Chained:
    """Loaders one after the other, as often as they can be iterated over.

    Attributes:
        loaders: The loaders.
    """

    loaders: tuple[Iterable[Any], ...]

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches of all."""
        return chain.from_iterable(self.loaders)


def chained(loaders: Sequence[Iterable[Any] | None]) -> Any:
    """Return one loader of all the data of several.

    Args:
        loaders: At least one; ``None`` where data are not at hand.

    Returns:
        The loader; ``None`` if some data are not at hand, or several loaders are shared by several
        processes, whose parts cannot be told apart any more.
    """
    known = [loader for loader in loaders if loader is not None]
    if len(known) < len(loaders):
        return None
    if len(known) == 1:
        return known[0]
    return None if any(map(is_sharded, known)) else Chained(tuple(known))
