"""The process group through which processes tell each other how their work goes, and errors."""

from __future__ import annotations

from collections.abc import Sequence
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


def kind_of(error: Exception) -> str:
    """Return the name of an error's class, in whichever process it was raised."""
    return error.kind if isinstance(error, OtherProcessFailed) else type(error).__name__


class ProcessLost(RuntimeError):
    """Another process has ended, or cannot be reached."""


FORWARD, BACKWARD = "forward pass", "backward pass"  # of a model that processes run in step
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


def different_things(steps: Sequence[str]) -> str:
    """Return what to say of processes that are not at the same step.

    Args:
        steps: What each is about to do, in the order of their ranks.
    """
    told = ", ".join(f"process {rank}: {step}" for rank, step in enumerate(steps))
    text = f"the processes do different things ({told})"
    if not {FORWARD, BACKWARD}.intersection(steps):
        return text
    return (
        f"{text}: how many passes the sharded model takes depends on the data in a way that is not "
        "known; give every process all the data, in the same order"
    )
