"""Loaders that skip batches: whose the remaining examples are, and that each counts once."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler, skip_first_batches
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler

from laplace_lora.data import shares
from laplace_lora.data.one_draw import draws_anew
from laplace_lora.data.order import check_order
from laplace_lora.data.shares import share_of


class Numbers(torch.utils.data.Dataset):
    """Items that are their places, also several at once."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, place):
        return {"labels": torch.as_tensor(place)}


class Choosing(BatchSampler):
    """A sampler that may leave batches out by a rule of its own."""

    def __init__(self, batch_sampler):
        self.batch_sampler = batch_sampler


class ByLength:
    """Batches of similar lengths, the examples with high numbers first."""

    def __init__(self, sampler, batch_size=2):
        self.sampler, self.batch_size, self.drop_last = sampler, batch_size, False

    def __iter__(self):
        places = sorted(self.sampler, reverse=True)
        yield from (places[i : i + self.batch_size] for i in range(0, len(places), self.batch_size))


def by_examples(data, rank):
    return BatchSampler(DistributedSampler(data, 2, rank, shuffle=False), 2, drop_last=False)


def by_batches(data, rank, **options):
    batches = BatchSampler(range(len(data)), 2, drop_last=False)
    return BatchSamplerShard(batches, 2, rank, **options)


def by_pieces(data, rank):
    return by_batches(data, rank, split_batches=True)


def uneven(data, rank):
    return by_batches(data, rank, even_batches=False)


def skipped_first(data, sampler, skips):
    loader = DataLoader(data, batch_sampler=sampler)
    for skipped in skips:
        loader = skip_first_batches(loader, skipped)
    return loader


def skipped_inside(data, sampler, skips):
    """As accelerate does it for loaders without a batch size."""
    return DataLoader(data, sampler=SkipBatchSampler(sampler, sum(skips)), batch_size=None)


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setattr(shares, "processes", lambda: 2)


def dealt(loader):
    return [(b["labels"].tolist(), places.tolist()) for b, places in share_of(loader).of(loader)]


@pytest.mark.parametrize("skip", [skipped_first, skipped_inside])
@pytest.mark.parametrize("deals", [by_examples, by_batches, by_pieces, uneven])
@pytest.mark.parametrize("skips", [(), (1,), (1, 1), (9,)])
@pytest.mark.parametrize("n", [4, 9, 11])
def test_each_example_that_is_left_counts_once(n, skips, deals, skip):
    data, counted, expected = Numbers(n), [], []
    for rank in range(2):
        for found, places in dealt(skip(data, deals(data, rank), skips)):
            assert found == places
            counted += found
        whole = dealt(DataLoader(data, batch_sampler=deals(data, rank)))
        expected += [place for found, _ in whole[sum(skips) :] for place in found]
    assert sorted(counted) == sorted(expected)
    assert skips or sorted(counted) == list(range(n))


@pytest.mark.parametrize("skips", [(), (1,), (9,)])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sizes", [(3, 4, 1, 2), (3, 1, 4), (2, 5, 1, 1, 3), (6,)])
def test_ready_made_batches_count_once_as_wholes(sizes, drop_last, skips):
    """The sampler of a loader without a batch size gives the places of batches, not examples."""
    numbers = torch.arange(sum(sizes)).split(sizes)
    data = [{"labels": each} for each in numbers]
    even = len(data) // 2 * 2
    expected, found = set(range(even if drop_last else len(data))), []
    for rank in range(2):
        sampler = DistributedSampler(data, 2, rank, shuffle=False, drop_last=drop_last)
        dealing = SkipBatchSampler(sampler, sum(skips)) if skips else sampler
        found += dealt(DataLoader(data, sampler=dealing, batch_size=None))
        expected -= set(range(rank, len(data), 2)[: sum(skips)])
    places = [place for _, places in found for place in places]
    counted = [number for batch, _ in found for number in batch]
    in_order = [number for _, number in sorted(zip(places, counted, strict=True))]
    assert in_order == [n for index in sorted(expected) for n in numbers[index].tolist()]


@pytest.mark.parametrize("deals", [by_examples, by_batches, by_pieces, uneven])
def test_items_of_several_examples_are_refused(deals):
    data = [{"labels": torch.arange(5)}] * 6

    def joined(items):
        return {"labels": torch.cat([item["labels"] for item in items])}

    loader = DataLoader(data, batch_sampler=deals(data, 0), collate_fn=joined)
    with pytest.raises(ValueError, match="examples, so repeats cannot be told apart"):
        dealt(loader)


@pytest.mark.parametrize("deals", [by_examples, by_batches])
def test_samplers_that_may_change_what_is_dealt_out_are_refused(deals):
    data = Numbers(8)
    with pytest.raises(TypeError, match="Choosing may change the batches that the loader deals"):
        share_of(DataLoader(data, batch_sampler=Choosing(deals(data, 0))))


def by_length(data, rank, **options):
    sampler = DistributedSampler(data, 2, rank, shuffle=False, **options)
    return DataLoader(data, batch_sampler=ByLength(sampler))


def test_repeats_that_a_sampler_may_put_first_are_refused():
    """The repeat of seven, example 0, is no longer the last of its process."""
    with pytest.raises(TypeError, match="ByLength may change the batches"):
        share_of(by_length(Numbers(7), 1))


class Named(BatchSampler):
    """A batch sampler of one's own, in the order of what is dealt out."""


def test_batch_samplers_that_keep_the_order_are_taken():
    numbers = []
    for rank in range(2):
        sampler = DistributedSampler(Numbers(7), 2, rank, shuffle=False)
        found = dealt(DataLoader(Numbers(7), batch_sampler=Named(sampler, 2, False)))
        numbers += [number for batch, _ in found for number in batch]
    assert sorted(numbers) == list(range(7))


@pytest.mark.parametrize("n,options", [(8, {}), (7, {"drop_last": True})])
def test_samplers_may_reorder_where_nothing_is_repeated(n, options):
    found = [pair for rank in range(2) for pair in dealt(by_length(Numbers(n), rank, **options))]
    numbers = [number for batch, _ in found for number in batch]
    places = [place for _, each in found for place in each]
    assert sorted(numbers) == sorted(places) == list(range(n // 2 * 2))


def test_batches_may_not_be_skipped_that_a_sampler_reorders():
    loader = skip_first_batches(by_length(Numbers(8), 0), 1)
    with pytest.raises(TypeError, match="ByLength may change the batches"):
        share_of(loader)


def test_batches_of_places_are_looked_into():
    """A loader without a batch size, whose sampler gives the places of whole batches."""
    data = Numbers(8)

    def loader(**options):
        places = RandomSampler(data, **options)
        return DataLoader(data, sampler=BatchSampler(places, 2, False), batch_size=None)

    with pytest.raises(ValueError, match="random order"):
        check_order(loader(), "the pool")
    assert draws_anew(loader(replacement=True)) and not draws_anew(loader())
