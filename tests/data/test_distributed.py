"""Several processes with one loader: the posterior of one process, and errors that end all."""

import signal

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    SequentialSampler,
)

from laplace_lora import KronLoraLaplace
from laplace_lora.data import shares
from laplace_lora.data.distributed import together
from laplace_lora.data.shares import share_of
from support.batches import LENGTHS, loader
from support.posteriors import LOW
from support.processes import BATCH, CASES, KINDS, PROCESSES, brier, posterior_of, worker
from support.references import assert_near
from support.shared_calls import CALLS, data_of, posterior, result_of, whole
from support.spawned import exit_codes

pytestmark = pytest.mark.slow  # tests/data/test_streams.py has two processes in the default run


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    assert exit_codes(worker, folder, PROCESSES) == [0, -signal.SIGKILL]
    killing = torch.load(folder / "killing.pt")
    return killing, {rank: torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)}


@pytest.fixture(scope="module")
def results(outcomes):
    return outcomes[1]


@pytest.mark.parametrize("cls,kwargs", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(results, kind, cls, kwargs):
    for found in results.values():
        one = posterior_of(cls, loader(), **kwargs)
        count, evidence, probs, *tuned = found[kind, cls.__name__, len(kwargs)]
        assert count == len(LENGTHS) == 7
        assert_near(torch.tensor(evidence).double(), one.log_marginal_likelihood())
        assert_near(probs, one(BATCH))
        if kind == "sampler":
            expected = []
            for options in ({}, {"loss": brier}):
                one.optimize_prior_precision(method="gridsearch", val_loader=loader(), **options)
                expected.append(one.prior_precision.item())
            one.optimize_prior_precision(method="val_gd", val_loader=loader(), n_steps=5)
            expected.append(one.prior_precision.item())
            assert tuned == pytest.approx(expected, rel=1e-4)


def test_loaders_that_are_not_shared_or_dispatched(results):
    one = posterior_of(KronLoraLaplace, loader(), **LOW)
    for found in results.values():
        assert found["plain"][0] == found["dispatched"][0] == 7
        assert_near(found["plain"][1], one(BATCH))
        assert_near(found["dispatched"][1], one(BATCH))  # by accelerate, from the main process


def test_an_error_in_one_process_ends_all(results):
    for rank, found in results.items():
        for bad_rank, text in enumerate(found["errors"]):
            if rank == bad_rank:
                assert text.startswith("ValueError: labels must lie in 0..2")
            else:
                assert text.startswith(
                    f"OtherProcessFailed: process {bad_rank} failed: ValueError: labels must lie"
                )
        assert len(found["errors"]) == 2
        others = "OtherProcessFailed: process 1 failed: ValueError: no luck"
        assert found["second pass"] == ("ValueError: no luck" if rank else others)


def test_a_killed_process_ends_the_others_at_once(outcomes):
    """Not after the half hour that gloo waits for a process that is merely slow."""
    killing, _ = outcomes
    assert killing["error"] == "another process has ended or cannot be reached"
    assert killing["seconds"] < 60
    assert killing["kept"]


@pytest.mark.parametrize("call", CALLS)
def test_every_call_gives_what_one_process_would(results, call):
    expected = result_of(call, whole(call))
    for found in results.values():
        assert_near(found["shared"][call], expected, 1e-4)


@pytest.mark.parametrize("call", [c for c in CALLS if c != "loo"])
def test_a_process_may_have_no_examples(results, call):
    expected = result_of(call, DataLoader(data_of(call)[:4], batch_size=4))
    for found in results.values():
        assert_near(found["lonely"][call], expected, 1e-4)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_that_fails_in_one_process_fails_in_all(results, call):
    said = "ValueError: this example cannot be read"
    bad = list(CALLS).index(call) % 2
    assert results[bad]["broken"][call] == said
    assert results[1 - bad]["broken"][call] == f"OtherProcessFailed: process {bad} failed: {said}"


@pytest.mark.parametrize("place", ["loss", "metric", "rows"])
def test_what_fails_after_the_data_fails_in_all(results, place):
    assert results[1]["later"][place] == "ValueError: no luck"
    assert results[0]["later"][place] == "OtherProcessFailed: process 1 failed: ValueError: no luck"


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_stand_in_the_order_of_the_data(results, kind):
    expected = result_of("predict", whole("predict"))
    for found in results.values():
        assert_near(found["orders"][kind], expected)


def test_a_model_in_ddp_is_unwrapped(results):
    la = posterior()
    expected = CALLS["fit"](la, loader()), la.predict(whole("predict")).probs[:5]
    for found in results.values():
        for one, other in zip(found["wrapped"], expected, strict=True):
            assert_near(one, other)


def test_the_callback_in_several_processes(results):
    nll = []
    for rank, found in results.items():
        cases = found["trainings"]
        error, steps, n_data, value = cases["well"]
        assert (error, steps, n_data) == (None, 2, 7)
        nll.append(value)
        whole, two, expected = cases["predicted"]
        assert_near(whole, expected, 1e-4)
        assert_near(two, expected[:2], 1e-4)
        error, steps, n_data, value = cases["disk"]  # one cannot save, and all go on
        assert (error, steps, n_data, value) == (None, 2, 7, None)
        error, steps, n_data, _ = cases["data"]
        assert steps == 0 and n_data is None
        said = "ValueError: eval data: this example cannot be read"
        assert error == (said if rank else f"OtherProcessFailed: process 1 failed: {said}")
    assert nll[0] == nll[1]


def test_ivon_averages_over_processes(results):
    (one, w, momentum), (other, *same) = (found["ivon"] for found in results.values())
    assert torch.equal(w, same[0]) and torch.equal(momentum, same[1])
    first = 0.1 * (one[0] + other[0]) / 2
    assert_near(momentum, 0.9 * first + 0.1 * one[1])  # in the second step one took part
    assert not torch.equal(one[0][:2], other[0][:2])
    assert one[0][2:].all() and not other[0][2:].any()  # the second parameter's, of one process


def test_alone_nothing_changes():
    data = loader(2)
    with together(data, everyone=True) as team:
        assert not team.shared
        assert [len(b["labels"]) for b in team.batches(data, "")] == [2, 2, 2, 1]
        assert torch.equal(team.rows(x=[torch.ones(2)])["x"], torch.ones(2))
        assert team.total(1, 2.5) == [1, 2.5] and team.any_of(None) is None


@pytest.mark.parametrize(
    ("sampler", "places"),
    [
        (lambda data: DistributedSampler(data, 2, 1, shuffle=False), [[1, 3], [5]]),
        (lambda data: DistributedSampler(data, 1, 0), None),
        (lambda data: SequentialSampler(data), None),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_samplers_are_found_wherever_they_are(monkeypatch, sampler, places, wrapped):
    monkeypatch.setattr(shares, "processes", lambda: 2)
    data = loader().dataset
    own = sampler(data)
    batches = {"batch_sampler": BatchSampler(own, 2, drop_last=False)} if wrapped else {}
    share = share_of(DataLoader(data, **(batches or {"sampler": own, "batch_size": 2})))
    if places is None:
        assert share is None
    else:
        found = [share.counted(i, 2 * i, 2).tolist() for i in range(2)]
        assert found == places


def test_what_cannot_be_counted_is_refused(monkeypatch):
    monkeypatch.setattr(shares, "processes", lambda: 2)
    data = loader().dataset
    with pytest.raises(TypeError, match="deals its data out to 3 processes, but there are 2"):
        share_of(DataLoader(data, sampler=DistributedSampler(data, 3, 1)))
    batches = [[0, 1], [2, 3], [4]]
    shard = BatchSamplerShard(batches, 2, 1)
    share = share_of(DataLoader(data, batch_sampler=shard))  # batches of any size
    assert [len(share.counted(i, 0, 2)) for i in range(2)] == [2, 0]
    batches = FixedBatches(batches)
    with pytest.raises(TypeError, match="repeats batches of FixedBatches"):
        share_of(DataLoader(data, batch_sampler=BatchSamplerShard(batches, 2, 1)))
    uneven = BatchSamplerShard(batches, 2, 1, even_batches=False)
    assert share_of(DataLoader(data, batch_sampler=uneven)).counted(0, 0, 2).tolist() == [2, 3]


class FixedBatches(list):
    batch_size = 2
