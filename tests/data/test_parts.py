"""Data that each process has cut by itself are pointed out, and nothing that is right is."""

import random
import warnings
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from laplace_lora.data import parts
from laplace_lora.data.parts import compared
from support.batches import loader
from support.parts import CUT, data, fitted, hugging_face, worker
from support.references import assert_near
from support.spawned import exit_codes

ROWS = [{"input_ids": torch.arange(i, i + 3), "labels": torch.tensor(i % 2)} for i in range(24)]
MODEL = torch.nn.Linear(2, 2)
NOTED = "processes {} and {} have been given different data"


class Processes:
    """Several processes that come to one line, one after the other, and leave in that order."""

    def __init__(self, monkeypatch, count):
        self.store, self.calls = dist.HashStore(), [Counter() for _ in range(count)]
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: self.store)
        monkeypatch.setattr(dist, "get_world_size", lambda: count)

    def be(self, rank):
        self.monkeypatch.setattr(dist, "get_rank", lambda: rank)
        self.monkeypatch.setattr(parts, "_CALLS", self.calls[rank])

    def outcomes(self, loaders, models=None):
        """Return what each process hears, and when."""
        blocks, heard = {}, [None] * len(loaders)
        for rank, each in enumerate(loaders):
            self.be(rank)
            blocks[rank] = compared([each], models[rank] if models else MODEL)
            heard[rank] = self._heard("before", blocks[rank].__enter__)
        for rank, block in blocks.items():
            self.be(rank)
            left = self._heard("after", block.__exit__, None, None, None)
            assert not (left and heard[rank]), "said twice"
            heard[rank] = heard[rank] or left
        return heard

    def _heard(self, when, call, *args):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            call(*args)
        return f"{when}: {said[0].message}" if said else None


@pytest.fixture
def two(monkeypatch):
    return Processes(monkeypatch, 2)


def loaders(*data, **options):
    return [DataLoader(each, batch_size=2, **options) for each in data]


@pytest.mark.parametrize(
    "cut",
    [
        lambda rank: ROWS[rank::2],
        lambda rank: ROWS[12 * rank :][:12],
        lambda rank: ROWS[rank:23:2],
        lambda rank: Subset(ROWS, range(rank, 24, 2)),
        lambda rank: [(row["input_ids"], row["labels"]) for row in ROWS[rank::2]],
    ],
)
def test_all_say_that_they_have_parts(two, cut):
    first, second = two.outcomes(loaders(cut(0), cut(1)))
    assert first.startswith(f"after: {NOTED.format(0, 1)}")
    assert second.startswith(f"before: {NOTED.format(1, 0)}")
    assert "DistributedSampler" in first


@pytest.mark.parametrize("count", [3, 24])
def test_of_many_processes_each_finds_a_neighbour_with_another_part(monkeypatch, count):
    heard = Processes(monkeypatch, count).outcomes(loaders(*(ROWS[i::count] for i in range(count))))
    assert all(heard)


def test_parts_that_samplers_make(two):
    by_rank = [SubsetRandomSampler(range(rank, 23, 2)) for rank in range(2)]
    assert all(two.outcomes([DataLoader(ROWS, 2, sampler=sampler) for sampler in by_rank]))
    in_batches = [BatchSampler(range(rank, 23, 2), 2, False) for rank in range(2)]
    assert all(two.outcomes([DataLoader(ROWS, batch_sampler=each) for each in in_batches]))


class Augmented(list):
    """Rows with noise on their tokens, other ones each time."""

    def __init__(self, rows, name="input_ids"):
        super().__init__(rows)
        self.name = name

    def __getitem__(self, place):
        row = super().__getitem__(place)
        return {**row, self.name: torch.randint(10**6, row[self.name].shape)}


class Broken(list):
    def __getitem__(self, place):
        raise OSError("no such file")


class Unknown(RandomSampler):
    def __len__(self):
        raise RuntimeError("nobody knows")


def shuffled(seed):
    rows = list(ROWS)
    random.Random(seed).shuffle(rows)
    return rows


def ready_made(seed):
    rows = shuffled(seed)
    size = 2 + seed
    batches = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [torch.utils.data.default_collate(batch) for batch in batches]


def floats(rank):
    return [{"pixels": torch.rand(3), "labels": torch.tensor(i % 2)} for i in range(24)]


@pytest.mark.parametrize(
    "given",
    [
        lambda _: loaders(ROWS)[0],
        lambda _: loaders(ROWS, shuffle=True)[0],
        lambda seed: loaders(shuffled(seed))[0],
        lambda _: DataLoader(ROWS, sampler=RandomSampler(ROWS, num_samples=5)),
        lambda _: DataLoader(ROWS, sampler=SubsetRandomSampler(torch.randperm(24)[:8])),
        lambda _: loaders(Augmented(ROWS))[0],
        lambda _: loaders(Augmented(ROWS, "labels"))[0],
        lambda seed: loaders(floats(seed))[0],
        lambda _: loaders(Broken(ROWS))[0],
        lambda seed: DataLoader(ready_made(seed), batch_size=None),
        lambda seed: loaders(ROWS[6 * seed :][:18])[0],  # a fold of one's own
        lambda seed: [ROWS] * (seed + 1),
        lambda seed: DataLoader(ROWS[seed:], sampler=Unknown(ROWS)),
    ],
)
def test_nothing_else_is(two, given):
    pair = [given(0), given(1)]
    before = torch.random.get_rng_state()
    assert two.outcomes(pair) == [None, None]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_other_calls_are_not_compared(two):
    """One process alone may have others, at another line or by a model of its own."""
    two.be(0)
    with compared(loaders(ROWS[:5]), MODEL):
        pass
    assert two.outcomes(loaders(ROWS, ROWS)) == [None, None]
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    assert two.outcomes(loaders(ROWS[:5], ROWS[5:]), models) == [None, None]
    for model in models:
        model.requires_grad_(False)
    assert two.outcomes(loaders(ROWS[:5], ROWS[5:]), models) == [None, None]
    assert all(two.outcomes(loaders(ROWS[:5], ROWS[5:]), models[:1] * 2))
    two.be(1)
    before = two.store.num_keys()
    with compared(loaders(ROWS[:7]), None):  # nothing is known of what runs on them
        pass
    assert two.store.num_keys() == before


def test_workers_inherit_nothing_that_a_data_set_opens(two):
    class Opening(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, place):
            raise AssertionError("read outside of a worker")

    assert two.outcomes([DataLoader(Opening(), num_workers=1)] * 2) == [None, None]
    tensors = TensorDataset(torch.stack([row["input_ids"] for row in ROWS]))
    for whole in (ROWS, tensors):
        half = [Subset(whole, range(rank, 24, 2)) for rank in range(2)]
        assert all(two.outcomes([DataLoader(each, num_workers=1) for each in half]))


def test_a_group_without_a_store(two, monkeypatch):
    def none():
        raise ValueError("no store")

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", none)
    assert two.outcomes(loaders(ROWS[::2], ROWS[1::2])) == [None, None]


def test_hugging_face_data(two):
    whole = hugging_face(loader().dataset)
    assert two.outcomes(loaders(whole, whole.shuffle(seed=1))) == [None, None]
    assert all(two.outcomes(loaders(whole.shard(2, 0), whole.shard(2, 1))))


@pytest.mark.slow
def test_fits_in_two_processes(tmp_path):
    assert exit_codes(worker, tmp_path) == [0, 0]
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for kind in (*CUT, "gridsearch", "calibrate", "evaluate"):
        said = [str(found[kind]) for found in results]
        assert any("have been given different data" in text for text in said), (kind, said)
    assert results[0]["one alone"] == 3
    one = fitted(data())
    for rank, found in enumerate(results):
        count, evidence = found["reordered"]
        assert count == len(data())
        assert_near(evidence, one.log_marginal_likelihood())
        assert_near(found["predicted"], one.predict(loaders(data()[rank::2])[0]).probs)
        assert found["other model"] == 4
