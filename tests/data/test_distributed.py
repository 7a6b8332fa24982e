"""Several processes with one loader: the posterior of one process, and errors that end all."""

import multiprocessing
import signal
import socket

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from laplace_lora import KronLoraLaplace
from laplace_lora.data import distributed as sharding
from support.batches import LENGTHS, loader
from support.posteriors import LOW
from support.processes import BATCH, CASES, PROCESSES, brier, posterior_of, worker
from support.references import assert_near


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    folder = tmp_path_factory.mktemp("results")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [context.Process(target=worker, args=(r, port, folder)) for r in range(PROCESSES)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(timeout=300)
    codes = [process.exitcode for process in workers]
    for process in workers:
        process.kill()
    assert codes == [0, -signal.SIGKILL]
    killing = torch.load(folder / "killing.pt")
    return killing, {rank: torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)}


@pytest.fixture(scope="module")
def results(outcomes):
    return outcomes[1]


@pytest.mark.parametrize("cls,kwargs", CASES)
@pytest.mark.parametrize("kind", ["sampler", "accelerate", "split", "uneven"])
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


def test_a_loader_that_is_not_shared_is_fitted_as_it_is(results):
    one = posterior_of(KronLoraLaplace, loader(), **LOW)
    for found in results.values():
        assert found["plain"][0] == 7
        assert_near(found["plain"][1], one(BATCH))


def test_an_error_in_one_process_ends_all(results):
    for rank, found in results.items():
        for bad_rank, text in enumerate(found["errors"]):
            if rank == bad_rank:
                assert text.startswith("ValueError: labels must lie in 0..2")
            else:
                assert text.startswith(
                    f"RuntimeError: process {bad_rank} failed: ValueError: labels must lie"
                )
        assert len(found["errors"]) == 2
        others = "RuntimeError: process 1 failed: ValueError: no luck"
        assert found["second pass"] == ("ValueError: no luck" if rank else others)
        assert found["few"] == "process 1 got no examples; use fewer processes"
        assert "dispatch_batches=False" in found["dispatched"]


def test_a_killed_process_ends_the_others_at_once(outcomes):
    """Not after the half hour that gloo waits for a process that is merely slow."""
    killing, _ = outcomes
    assert killing["error"] == "another process has ended or cannot be reached"
    assert killing["seconds"] < 60
    assert killing["kept"]


def test_alone_nothing_changes():
    data = loader(2)
    assert not sharding.is_sharded(data)
    assert [len(b["labels"]) for b in sharding.without_repeats(data)] == [2, 2, 2, 1]
    assert sharding.processes() == 1 and sharding.is_main()
    assert torch.equal(sharding.gather_for(data)(torch.ones(2)), torch.ones(2))
    sampler = BatchSampler(SequentialSampler(range(3)), 2, drop_last=False)
    assert list(sharding.without_repeats(DataLoader(range(3), batch_sampler=sampler)))[
        1
    ].tolist() == [2]
