"""Loaders that draw other examples in each pass are read as one draw by a fit and its tunings."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import Trainer

from laplace_lora import FullLoraLaplace, KronLoraLaplace
from laplace_lora.data.one_draw import draws_anew, one_draw, same_draw
from support.batches import split_rows, token_batch
from support.models import peft_model
from support.sweeps import rest_slow
from support.trainers import quiet

ROWS = split_rows(token_batch((5, 4, 3) * 8, pad_to=5))
N = len(ROWS)
WEIGHTS = [1.0] * (N // 2) + [6.0] * (N // 2)


class Shuffling(torch.utils.data.Sampler):
    """A sampler of a kind of its own, with numpy's random numbers."""

    def __init__(self, replace):
        self.replace, self.source = replace, np.random.default_rng(0)

    def __len__(self):
        return N

    def __iter__(self):
        return iter(self.source.choice(N, N, replace=self.replace).tolist())


class Relabelling(DataLoader):
    """A loader that does more with its batches."""

    def __iter__(self):
        return map(dict, super().__iter__())


def by(sampler, **options):
    return DataLoader(ROWS, 6, sampler=sampler, **options)


ANEW = {
    "weighted": lambda: by(WeightedRandomSampler(WEIGHTS, N)),
    "generator": lambda: by(WeightedRandomSampler(WEIGHTS, N, generator=torch.Generator())),
    "replacement": lambda: by(RandomSampler(ROWS, replacement=True)),
    "some": lambda: by(RandomSampler(ROWS, num_samples=N // 2)),
    "more": lambda: by(RandomSampler(ROWS, num_samples=N + 4)),
    "drop_last": lambda: DataLoader(ROWS, 7, shuffle=True, drop_last=True),
    "batches": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 7, True)),
    "unknown": lambda: by(Shuffling(replace=True)),
}
SAME = {
    "order": lambda: DataLoader(ROWS, 7, drop_last=True),
    "shuffle": lambda: DataLoader(ROWS, 7, shuffle=True),
    "drop_nothing": lambda: DataLoader(ROWS, 6, shuffle=True, drop_last=True),
    "twice": lambda: by(RandomSampler(ROWS, num_samples=2 * N)),
    "subset": lambda: by(SubsetRandomSampler(range(9))),
    "unknown": lambda: by(Shuffling(replace=False)),
    "list": lambda: [token_batch()],
    "batches": lambda: DataLoader(ROWS, batch_sampler=BatchSampler(range(N), 7, drop_last=True)),
}


def ids(loader):
    return [batch["input_ids"].tolist() for batch in loader]


def posterior(cls=KronLoraLaplace, **kwargs):
    return cls(peft_model("bert"), "classification", **kwargs)


@pytest.mark.parametrize("kind", ANEW)
def test_a_draw_is_that_of_a_pass_and_stays_the_same(kind):
    passes = []
    for read in (lambda loader: loader, one_draw):
        loader = ANEW[kind]()
        torch.manual_seed(1)
        passes.append(ids(read(loader)))
        assert draws_anew(loader)
    if kind != "unknown":  # which is asked twice before
        assert passes[0] == passes[1]
    drawn = one_draw(loader)
    assert not draws_anew(drawn)
    assert ids(drawn) == ids(drawn) != ids(loader)


@pytest.mark.parametrize("kind", SAME)
def test_loaders_of_the_same_examples_stay_as_they_are(kind):
    loader = SAME[kind]()
    assert one_draw(loader) is loader
    assert same_draw(loader, "it") is loader


def test_batches_of_a_data_set():
    data = [token_batch(seed=n) for n in range(4)]
    loader = DataLoader(data, batch_size=None, sampler=RandomSampler(data, replacement=True))
    drawn = one_draw(loader)
    assert ids(drawn) == ids(drawn)


class Counted(Shuffling):
    """A sampler that knows how often it was gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize("replace", [False, True])
def test_a_sampler_of_a_kind_of_its_own_is_asked_once(replace):
    sampler = Counted(replace)
    for _ in range(3):  # as a fit and its tunings do, through loaders of their own
        assert draws_anew(by(sampler)) is replace
    assert sampler.passes == 3  # to see whether it is an iterator, and twice for its places


@pytest.mark.parametrize("without", ["__hash__", "__weakref__"])
def test_samplers_that_cannot_be_remembered_are_asked_again(without):
    class Plain:
        __slots__ = () if without == "__weakref__" else ("__weakref__",)
        if without == "__hash__":
            __hash__ = None

        def __len__(self):
            return N

        def __iter__(self):
            return iter(torch.randint(N, (N,)).tolist())

    loader = by(Plain())
    assert draws_anew(loader) and draws_anew(loader)


@pytest.mark.parametrize("kind", ["weighted", "drop_last", "unknown"])
@pytest.mark.parametrize("options", rest_slow([{}, {"eigenvalue_correction": True}], 1))
def test_fits_and_tunings_see_one_draw(kind, options):
    la, loader = posterior(**options), ANEW[kind]()
    torch.manual_seed(0)
    la.fit(loader)
    again, batches = posterior(**options), DataLoader(list(la._train_loader), batch_size=None)
    again.fit(batches)

    def found(la, data):
        la.prior_precision = 1.0
        yield la.log_marginal_likelihood(correction=True, train_loader=data).item()
        la.optimize_prior_precision(method="loo", train_loader=data)
        yield la.prior_precision.item()
        yield la.recentre(precision=1.0, train_loader=data).nll_after

    expected = list(found(again, batches))
    torch.manual_seed(1)
    assert list(found(la, None)) == pytest.approx(expected, rel=1e-6)
    torch.manual_seed(2)
    assert list(found(la, loader)) == pytest.approx(expected, rel=1e-6)  # as it was given


@pytest.mark.slow
def test_each_fit_draws_and_data_that_are_added_are_draws_of_their_own():
    loader = ANEW["weighted"]()
    first, second = posterior(FullLoraLaplace), posterior(FullLoraLaplace)
    first.fit(loader)
    second.fit(loader)
    assert ids(first._train_loader) != ids(second._train_loader)
    before = ids(first._train_loader)
    first.fit(loader, override=False)
    assert ids(first._train_loader)[: len(before)] == before
    assert len(ids(first._train_loader)) == 2 * len(before)
    first.optimize_prior_precision(method="loo")
    assert first.n_data == 2 * N


def test_a_fit_that_fails_does_not_exchange_the_draw_of_an_earlier_one():
    la, loader = posterior(), ANEW["weighted"]()
    la.fit(loader)
    drawn = same_draw(loader, "it")
    other = posterior(dict_key_y="missing")
    with pytest.raises(ValueError, match="no 'missing'"):
        other.fit(loader)
    assert same_draw(loader, "it") is drawn


def test_draws_that_are_not_those_of_the_fit_are_refused():
    la, loader = posterior(), ANEW["weighted"]()
    la.fit(loader)
    other = ANEW["weighted"]()
    for call in (
        lambda: la.optimize_prior_precision(method="loo", train_loader=other),
        lambda: la.log_marginal_likelihood(correction=True, train_loader=other),
        lambda: la.recentre(precision=1.0, train_loader=other),
        lambda: la.optimize_prior_precision(train_loader=other),
    ):
        with pytest.raises(ValueError, match="draws other examples in each pass"):
            call()


def test_loaders_that_cannot_be_kept_to_one_draw():
    loader = Relabelling(ROWS, 6, sampler=WeightedRandomSampler(WEIGHTS, N))
    with pytest.raises(ValueError, match="eigenvalue_correction needs those of the fit"):
        posterior(eigenvalue_correction=True).fit(loader)
    la = posterior()
    with pytest.warns(UserWarning, match="the gradient term is not measured.*draws other"):
        la.fit(loader, evidence_correction=True)
    with pytest.raises(ValueError, match="draws other examples"):
        la.optimize_prior_precision(method="loo")


def test_samplers_of_a_trainer(tmp_path):
    class Weighted(Trainer):
        def _get_train_sampler(self, *args):
            return WeightedRandomSampler(WEIGHTS, N)

    for kind, anew in ((Trainer, False), (Weighted, True)):
        trainer = kind(peft_model("bert"), quiet(tmp_path), train_dataset=ROWS)
        loader = trainer.get_train_dataloader()
        assert draws_anew(loader) is anew
        drawn = one_draw(loader)
        assert (drawn is loader) is not anew
        assert (ids(drawn) == ids(drawn)) is anew
