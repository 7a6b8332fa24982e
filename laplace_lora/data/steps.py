"""Equally many steps in all processes, whose batches are not equally many.

Each pass of a sharded model gathers its pieces from all processes, so all must make it. A process
that has no batch left, or leaves one out, takes a stand-in with the others and forgets the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from laplace_lora.data.batches import Batch, first_examples, on_cpu, splits_by_example
from laplace_lora.data.team import Together

SHOWN = 2  # examples of a stand-in


@dataclass(frozen=True)
class Step:
    """What a process does while others do theirs.

    Attributes:
        batch: Its own next batch, ``None`` where there is none left.
        stand_in: What the model is to run on instead, the result of which does not count.
    """

    batch: Any
    stand_in: Any = None


def steps(
    batches: Iterable[Batch],
    skipped: range,
    team: Together,
    divides: Callable[[Batch], bool] = splits_by_example,
) -> Iterator[Step]:
    """Yield a process's batches, with stand-ins where the model runs in step with others.

    The first step is the same stand-in for all, so that whatever a first batch is examined for is
    found, or not, by all alike.

    Args:
        batches: Those of this process.
        skipped: Indices of batches that it does not run the model on.
        team: The processes.
        divides: Whether every example of a batch has its own row of each tensor.
    """
    if not team.in_step:
        yield from map(Step, batches)
        return
    own = iter(batches)
    batch = next(own, None)
    shown = team.any_of(None if batch is None else on_cpu(_few(batch, divides)))
    if shown is None:
        return
    yield Step(None, shown)
    index = 0
    while True:
        is_run = batch is not None and index not in skipped
        reports = team.all_of((batch is not None, is_run))
        if not any(has_batch for has_batch, _ in reports):
            return
        stand_in = shown if not is_run and any(other for _, other in reports) else None
        yield Step(batch, stand_in)
        batch = next(own, None)
        index += 1


def _few(batch: Batch, divides: Callable[[Batch], bool]) -> Batch:
    return first_examples(batch, SHOWN) if divides(batch) else batch
