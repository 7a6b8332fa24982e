"""`together`: work that several processes share, from which all return or none does.

A process that fails alone would leave the others waiting in their next collective. So the block
ends with an exchange of reports: what one process raises, all hear of.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from laplace_lora.data import streams
from laplace_lora.data.messages import OtherProcessFailed, ProcessLost
from laplace_lora.data.shares import needs_comparison, processes, share_of
from laplace_lora.data.team import ALONE, Together, shared_blocks

__all__ = [
    "ALONE",
    "OtherProcessFailed",
    "ProcessLost",
    "Together",
    "deals_data_out",
    "is_sharded",
    "together",
]


@contextmanager
def together(
    *loaders: object, everyone: bool = False, device: torch.device | str = "cpu"
) -> Iterator[Together]:
    """Share work with the other processes, where they share a loader.

    However a process leaves the block, all leave it: with their results, or with an error each. A
    process that was killed silently (e.g. out of memory) is noticed at once, as reports go through
    gloo, see `messages`. Nothing is exchanged where no loader is shared.

    Args:
        *loaders: What the work iterates over, see `share_of`.
        everyone: All processes take part, whatever the loaders.
        device: Where a process without examples gets the others' rows.

    Raises:
        OtherProcessFailed: If another process failed.
        ProcessLost: If another process has ended.
        RuntimeError: If the processes do different things.
        TypeError: As `is_sharded`.
        ValueError: If processes read the same examples of a stream in different orders.
    """
    for loader in loaders:
        _compare(loader)
    deals = any(share_of(loader) is not None for loader in loaders)
    team = Together((everyone and processes() > 1) or deals, device, deals)
    shared = team.shared
    blocks = shared_blocks()
    if shared:
        blocks.append(team)
    try:
        yield team
        team.end(None)
    except ProcessLost:
        raise
    except Exception as error:
        team.end(error)
        raise
    finally:
        for loader in loaders:
            streams.forget(loader)
        if shared:
            blocks.remove(team)


def is_sharded(loader: object) -> bool:
    """Return whether a loader gives each process different examples; all processes ask together.

    Raises:
        TypeError: As `share_of`, or if some processes read the same examples of a stream and others
            do not.
    """
    _compare(loader)
    streams.forget(loader)
    return share_of(loader) is not None


def _compare(loader: object) -> None:
    """Let processes compare what they read of a stream, where it does not say whose it is."""
    if needs_comparison(loader):
        with together(everyone=True) as team:
            streams.decide(loader, team.all_of(streams.begin(loader)))


def deals_data_out() -> bool:
    """Return whether this thread is in shared work in which processes see different data."""
    return any(block.deals for block in shared_blocks())
