"""Steps: processes run their model equally often, on batches of their own where they may."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from laplace_lora.data.distributed import ALONE
from laplace_lora.data.steps import Step, steps


class Threads:
    """A team of threads, in place of processes."""

    in_step = True

    def __init__(self, count):
        self.barrier, self.said = threading.Barrier(count, timeout=30), [None] * count
        self.local = threading.local()

    @property
    def rank(self):
        return self.local.rank

    def all_of(self, value):
        self.said[self.local.rank] = value
        self.barrier.wait()
        heard = list(self.said)
        self.barrier.wait()
        return heard


def kind_of(batch):
    """Batches are a letter of their form, one of their traits and a number."""
    return None if batch[0] == "?" else (batch[0], batch[1])


def taken(*batches, skipped=(range(0), range(0)), met=()):
    """Return the steps of each of several threads, and what they have met."""
    team, known = Threads(len(batches)), [set(met) for _ in batches]

    def run(rank):
        team.local.rank = rank
        return list(steps(batches[rank].split(), skipped[rank], team, kind_of, known[rank]))

    with ThreadPoolExecutor(len(batches)) as pool:
        found = list(pool.map(run, range(len(batches))))
    assert known[0] == known[1]
    return [" ".join(step.batch + "+" * step.is_own for step in each) for each in found], known[0]


def test_batches_of_a_kind_that_is_known_are_each_processs_own():
    found, met = taken("ap1 ap3 ap5", "ap2 ap4 ap6")
    assert found == ["ap1+ ap2 ap3+ ap5+", "ap1 ap2+ ap4+ ap6+"]
    assert met == {("a", "p")}
    assert taken("ap1", "ap2", met=met)[0] == ["ap1+", "ap2+"]


def test_all_run_what_one_meets_for_the_first_time():
    found, met = taken("ap1 ap3 aq5 aq7", "ap2 aq4 ap6 aq8")
    assert found == ["ap1+ ap2 ap3+ aq4 aq5+ aq7+", "ap1 ap2+ ap3 aq4+ ap6+ aq8+"]
    assert met == {("a", "p"), ("a", "q")}


@pytest.mark.parametrize("pair", ["ap1 bp2", "bp1 ap2", "?1 ap2", "?1 ?2", "ap1 ?2"])
def test_all_run_batches_that_may_take_other_passes(pair):
    one, other = pair.split()
    found, _ = taken(one, other, met={("a", "p"), ("b", "p")})
    assert found == [f"{one}+ {other}", f"{one} {other}+"]


@pytest.mark.parametrize("counts", [(3, 1), (0, 2), (2, 2), (1, 0), (0, 0)])
def test_all_run_equally_often_and_each_its_own(counts):
    batches = [" ".join(f"ap{rank}{i}" for i in range(n)) for rank, n in enumerate(counts)]
    found, _ = taken(*batches)
    assert len({len(each.split()) for each in found}) == 1
    for each, own in zip(found, batches, strict=True):
        assert [b for b in each.split() if b.endswith("+")] == [f"{b}+" for b in own.split()]


def test_a_batch_that_one_process_skips_is_seen_and_run_by_nobody():
    found, _ = taken("ap1 ap3 ap5", "ap2 ap4 ap6", skipped=(range(1, 3), range(0)))
    # What stands for a batch that is skipped is the other's.
    assert found == ["ap1+ ap2 ap3+ ap4 ap5+ ap6", "ap1 ap2+ ap4+ ap6+"]
    found, _ = taken("ap1 ap3", "ap2 ap4", skipped=(range(1, 2),) * 2)
    assert found == ["ap1+ ap2 ap3+", "ap1 ap2+ ap4+"]


def test_nobody_to_wait_for():
    assert list(steps(["ap1"], range(0), ALONE, kind_of, set())) == [Step("ap1")]
