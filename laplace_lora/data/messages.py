"""The process group through which processes tell each other how their work goes, and errors."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(minutes=30)  # with processes that are alive, but slower


class OtherProcessFailed(RuntimeError):
    """Another process failed; this one ends with it.

    Args:
        rank: Which process.
        error: What it raised.

    Attributes:
        kind: Name of the error's class.
    """

    def __init__(self, rank: int, error: tuple[str, str]) -> None:
        super().__init__(f"process {rank} failed: {': '.join(error)}")
        self.kind = error[0]


class ProcessLost(RuntimeError):
    """Another process has ended, or cannot be reached."""


_LATEST: list[Any] = [None, None]  # the default group, and ours beside it


def messages() -> Any:
    """Return a gloo group of all processes; all call this together for the first time.

    It is gloo's whatever carries tensors: gloo sees at once that a process has ended, where NCCL
    waits for a time limit. And it is a group of its own, so that a report never meets a collective
    of a sharded model or of the user's.
    """
    world = dist.group.WORLD
    if _LATEST[0] is not world:
        _LATEST[:] = [world, dist.new_group(backend="gloo", timeout=PATIENCE)]
    return _LATEST[1]
