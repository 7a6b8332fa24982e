"""`together`: work that several processes share, from which all return or none does.

A process that fails alone would leave the others waiting in their next collective. So the block
ends with an exchange of reports: what one process raises, all hear of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from laplace_lora.data import streams
from laplace_lora.data.messages import OtherProcessFailed, ProcessLost
from laplace_lora.data.parts import compared
from laplace_lora.data.sharding import is_sharded_model
from laplace_lora.data.shares import needs_comparison, processes, share_of
from laplace_lora.data.team import ALONE, Together, shared_blocks

__all__ = [
    "ALONE",
    "OtherProcessFailed",
    "ProcessLost",
    "Together",
    "check_runs_same_data",
    "is_sharded",
    "together",
]


@contextmanager
def together(
    *loaders: object,
    everyone: bool = False,
    device: torch.device | str = "cpu",
    runs: nn.Module | None = None,
    in_step: bool = False,
    row_by_row: bool = False,
) -> Iterator[Together]:
    """Share work with the other processes, where they share a loader.

    However a process leaves the block, all leave it: with their results, or with an error each. A
    process that was killed silently (e.g. out of memory) is noticed at once, as reports go through
    gloo, see `messages`. Nothing is exchanged where no loader is shared.

    Args:
        *loaders: What the work iterates over, see `share_of`.
        everyone: All processes take part, whatever the loaders.
        device: Where a process without examples gets the others' rows.
        runs: The model that runs on the data. A sharded one is run by all processes on the same
            batches: what a loader deals out to them is exchanged, they draw the same random
            numbers, and each has all the results.
        in_step: Run a sharded model on each process's own batches instead, where these take
            equally many passes, see `steps`.
        row_by_row: What comes of the work stands for each example alone, so that processes may have
            different ones where no loader is shared.

    Raises:
        OtherProcessFailed: If another process failed.
        ProcessLost: If another process has ended.
        RuntimeError: If the processes do different things.
        TypeError: As `is_sharded`, or if a single batch is given for a loader.
        ValueError: If processes read the same examples of a stream in different orders.

    Warns:
        UserWarning: If processes have different data in a loader that is not shared, see `parts`.
    """
    for loader in loaders:
        if isinstance(loader, Mapping):
            raise TypeError(
                "expected batches to iterate over, got a single one; put it in a list: [batch]"
            )
        _compare(loader)
    own = [loader for loader in loaders if share_of(loader) is None]
    deals = len(own) < len(loaders)
    run_together = processes() > 1 and runs is not None and is_sharded_model(runs)
    if processes() == 1 or (row_by_row and not run_together):
        own = []
    own = [each for each in own if hasattr(each, "dataset") and not streams.is_stream(each)]
    if run_together:
        in_step = in_step and deals
        with (
            together(everyone=True) as crew,
            crew.common_draws(device, in_step),
            compared(own, runs),
        ):
            if in_step:
                crew.in_step = True
                yield crew
            else:
                yield Together(False, device, crew=crew)
        return
    team = Together((everyone and processes() > 1) or deals, device, deals)
    shared = team.shared
    blocks = shared_blocks()
    if shared:
        blocks.append(team)
    try:
        with compared(own, runs):
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


def check_runs_same_data(model: nn.Module) -> None:
    """Refuse to run a sharded model on different data in each process, where it was not announced.

    A forward pass gathers the pieces of all processes, so all must make the same ones; how many a
    batch takes depends on its examples.

    Raises:
        TypeError: If that is what this thread is about to do.
    """
    if any(block.deals for block in shared_blocks()) and is_sharded_model(model):
        raise TypeError(
            "the model is sharded, so all processes run it together, but the loader deals its data "
            "out: give every process all the data, in the same order (a DataLoader without a "
            "DistributedSampler, not prepared by accelerate)"
        )
