"""Steps: processes with unequal numbers of batches run their model equally often."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from laplace_lora.data.distributed import ALONE
from laplace_lora.data.steps import Step, steps
from support.batches import rows, token_batch

BATCH = token_batch((3, 2, 4))


class Threads:
    """A team of threads, in place of processes."""

    in_step = True

    def __init__(self, count):
        self.barrier, self.said = threading.Barrier(count, timeout=30), [None] * count
        self.local = threading.local()

    def all_of(self, value):
        self.said[self.local.rank] = value
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        return heard

    def any_of(self, value):
        return next((v for v in self.all_of(value) if v is not None), None)


def taken(batches, skipped):
    """Return the steps of each of several threads."""
    team = Threads(len(batches))

    def run(rank):
        team.local.rank = rank
        return list(steps(batches[rank], skipped[rank], team))

    with ThreadPoolExecutor(len(batches)) as pool:
        return list(pool.map(run, range(len(batches))))


def runs(found):
    """Return how often a thread has run its model, and on which batches of its own."""
    own = [step.batch for step in found if step.batch is not None and step.stand_in is None]
    return len(own) + sum(step.stand_in is not None for step in found), own


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (2, 2), (1, 0)])
def test_all_take_equally_many_steps(counts):
    batches = [[rows(BATCH, slice(i, i + 1)) for i in range(n)] for n in counts]
    found = [runs(each) for each in taken(batches, [range(0)] * 2)]
    assert [count for count, _ in found] == [1 + max(counts)] * 2
    for (_, own), given in zip(found, batches, strict=True):
        assert own == given


def test_the_first_step_is_the_same_for_all():
    first, second = taken([[BATCH], [rows(BATCH, slice(2, 3))]], [range(0)] * 2)
    assert first[0].batch is None and second[0].batch is None
    shown = [step.stand_in["input_ids"].tolist() for step in (first[0], second[0])]
    assert shown[0] == shown[1] == BATCH["input_ids"][:2].tolist()


def test_a_batch_that_one_process_skips_is_seen_and_not_run():
    batches = [[rows(BATCH, slice(i, i + 1)) for i in range(3)]] * 2
    first, second = taken(batches, [range(1, 3), range(0)])
    assert [step.batch is not None for step in first] == [False, True, True, True]
    assert [step.stand_in is not None for step in first] == [True, False, True, True]
    assert runs(first)[0] == runs(second)[0] == 4
    both = taken(batches, [range(1, 3), range(1, 3)])  # what nobody runs takes no stand-in
    assert all(step.stand_in is None for each in both for step in each[1:])


def test_nothing_to_do_and_nobody_to_wait_for():
    assert taken([[], []], [range(0)] * 2) == [[], []]
    assert list(steps([BATCH], range(0), ALONE)) == [Step(BATCH)]
