"""Steps in which all processes run their model equally often, on batches of their own if they may.

Each pass of a sharded model gathers its pieces from all processes, so all must make it. Batches of
one kind take equally many, once what is examined in the first of that kind has been. In any other
step all processes run the batches of all of them, and forget the results of those that are not
theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from laplace_lora.data.batches import Batch, on_cpu
from laplace_lora.data.team import Together, shared_blocks

# Its form, equal where batches take equally many passes, and what those of its form may differ in
# that is examined when it is first met; `None` where nothing is known beforehand.
Kind: TypeAlias = tuple[Hashable, Hashable] | None


@dataclass(frozen=True)
class Step:
    """A batch of a process, or one that it runs for another.

    Attributes:
        batch: The batch.
        is_own: Whether it is this process's; the results of others do not count.
    """

    batch: Any
    is_own: bool = True


def steps(
    batches: Iterable[Batch],
    skipped: range,
    team: Together,
    kind_of: Callable[[Batch], Kind],
    met: set[Kind],
) -> Iterator[Step]:
    """Yield a process's batches, with those of others where the model must run on them as well.

    Args:
        batches: Those of this process.
        skipped: Indices of batches that it does not run the model on.
        team: The processes.
        kind_of: From a batch to its kind.
        met: Kinds that all processes have run already; those that they run are added.
    """
    if not team.in_step:
        yield from map(Step, batches)
        return
    own, index = iter(batches), 0
    while True:
        batch = next(own, None)
        is_run = batch is not None and index not in skipped
        kind = kind_of(batch) if batch is not None and is_run else None
        reports = team.all_of((batch is not None, is_run, kind, kind in met))
        if not any(report[0] for report in reports):
            return
        kinds = [report[2] for report in reports if report[1]]
        # As each has said: one that failed may have met less than the others.
        are_met = all(report[3] for report in reports if report[1])
        if not kinds or (len(kinds) == len(reports) and are_met and _have_one_form(kinds)):
            dealt: list[Any] = [None] * len(reports)
        else:
            dealt = team.all_of(on_cpu(batch) if is_run else None)
        for rank, other in enumerate(dealt):
            if rank == team.rank and batch is not None:
                yield Step(batch)
            elif rank != team.rank and other is not None:
                yield Step(other, is_own=False)
        met.update(kinds)
        index += 1


def _have_one_form(kinds: list[Kind]) -> bool:
    """Return whether batches of some kinds, once met, take equally many passes."""
    forms = {None if kind is None else kind[0] for kind in kinds}
    return None not in kinds and len(forms) == 1


def before_pass(direction: str) -> None:
    """Let processes that run a model in step find out whether all are about to make a pass.

    Where one has failed, or does something else, all raise instead of waiting for it in the pass.

    Args:
        direction: `FORWARD` or `BACKWARD`.
    """
    for block in shared_blocks():
        if block.in_step:
            block.meet(direction)
