"""What each of several processes does with a shared loader."""

import os
import signal
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchmetrics import MeanMetric
from transformers import Trainer

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LaplaceCallback,
    LowRankLoraLaplace,
)
from laplace_lora.adaptive import IVON
from laplace_lora.fitting import second_pass
from laplace_lora.linalg.row_storage import RowStorage
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import LOW
from support.shared_calls import CALLS, Broken, data_of, posterior, result_of
from support.trainers import quiet

PROCESSES = 2
PATIENCE = timedelta(seconds=120)  # after which a process that waits in vain says so
KINDS = ("sampler", "accelerate", "split", "uneven")
CORRECTED = {**LOW, "eigenvalue_correction": True}
CASES = [
    (KronLoraLaplace, LOW),
    (KronLoraLaplace, CORRECTED),
    (DiagLoraLaplace, {}),
    (FullLoraLaplace, {"row_dtype": "bfloat16", "storage": "disk"}),
    (LowRankLoraLaplace, {"rank": 25}),
]
BATCH = token_batch((4, 2), seed=3)


def shared_loader(kind, batch_size=2, examples=None):
    """The same seven examples, dealt out to two processes; an uneven end in every way."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    plain = DataLoader(loader().dataset if examples is None else examples, batch_size=batch_size)
    if kind == "sampler":
        sampler = DistributedSampler(plain.dataset, shuffle=False)
        return DataLoader(plain.dataset, batch_size=batch_size, sampler=sampler)
    options = {"even_batches": kind != "uneven", "split_batches": kind == "split"}
    config = DataLoaderConfiguration(dispatch_batches=kind == "dispatched", **options)
    return Accelerator(cpu=True, dataloader_config=config).prepare(plain)


def posterior_of(cls, data, **kwargs):
    la = cls(peft_model("bert"), "classification", **kwargs)
    la.fit(data)
    return la


def scenario_results(rank):
    """Fit in every way that data may be shared, and collect what each process sees."""
    results = {}
    for kind in KINDS:
        for cls, kwargs in CASES:
            data = shared_loader(kind)
            la = posterior_of(cls, data, **kwargs)
            entry = [la.n_data, la.log_marginal_likelihood().item(), la(BATCH)]
            if kind == "sampler":
                la.optimize_prior_precision(method="gridsearch", val_loader=data)
                entry.append(la.prior_precision.item())
                la.optimize_prior_precision(
                    method="gridsearch", val_loader=data, loss=lambda p, y: brier(p, y)
                )
                entry.append(la.prior_precision.item())
                la.optimize_prior_precision(method="val_gd", val_loader=data, n_steps=5)
                entry.append(la.prior_precision.item())
            results[kind, cls.__name__, len(kwargs)] = entry
    plain = posterior_of(KronLoraLaplace, loader(2), **LOW)  # every process has all the data
    results["plain"] = [plain.n_data, plain(BATCH)]
    errors = []
    for bad_rank in (0, 1):
        data = shared_loader("sampler")
        if rank == bad_rank:
            data = DataLoader(
                [{**e, "labels": torch.tensor(9)} for e in data.dataset],
                batch_size=2,
                sampler=data.sampler,
            )
        la = posterior_of(KronLoraLaplace, loader(7), **LOW)
        before = la(BATCH)
        try:
            la.fit(data)
        except (ValueError, RuntimeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
        assert torch.equal(la(BATCH), before)  # nothing of the failed fit is left
    results["errors"] = errors
    la = posterior_of(KronLoraLaplace, loader(7), **CORRECTED)
    before, original = la(BATCH), second_pass.eigenbasis_diagonal
    if rank == 1:
        second_pass.eigenbasis_diagonal = lambda *args: (_ for _ in ()).throw(ValueError("no luck"))
    try:
        la.fit(shared_loader("sampler"))
    except (ValueError, RuntimeError) as error:
        results["second pass"] = f"{type(error).__name__}: {error}"
    second_pass.eigenbasis_diagonal = original
    assert torch.equal(la(BATCH), before)
    dispatched = posterior_of(KronLoraLaplace, shared_loader("dispatched"), **LOW)
    results["dispatched"] = [dispatched.n_data, dispatched(BATCH)]
    return results


def outcome_of(work):
    """Return what a call returns, or says when it fails."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def calls_together():
    """Make every call with shared data, with an empty share, and failing in one process alone."""
    shared, lonely, broken = {}, {}, {}
    for i, call in enumerate(CALLS):
        data = data_of(call)
        shared[call] = outcome_of(partial(result_of, call, shared_loader("sampler", 2, data)))
        if call != "loo":  # the fit has seen more
            few = shared_loader("uneven", 4, data[:4])
            lonely[call] = outcome_of(partial(result_of, call, few))
        bad = shared_loader("sampler", 2, Broken(data, 4 + i % 2))
        broken[call] = outcome_of(partial(result_of, call, bad))
    orders = {
        kind: outcome_of(partial(result_of, "predict", shared_loader(kind, 2, data_of("predict"))))
        for kind in KINDS
    }
    return {"shared": shared, "lonely": lonely, "broken": broken, "orders": orders}


def failures_after_the_data(rank):
    """Fail in one process with what comes after its data have been read."""

    def fail(*args):
        if rank == 1:
            raise ValueError("no luck")
        return torch.tensor(0.0)

    la, results = posterior(), {}
    for name, loss in (("loss", fail), ("metric", Unlucky(rank))):
        data = shared_loader("sampler", 2, data_of("grid"))
        work = partial(la.optimize_prior_precision, method="gridsearch", val_loader=data, loss=loss)
        results[name] = outcome_of(work)
    take = RowStorage.take
    RowStorage.take = lambda self, other: fail() if rank == 1 else take(self, other)
    rows = FullLoraLaplace(peft_model("bert"), "classification")
    results["rows"] = outcome_of(partial(rows.fit, shared_loader("sampler")))
    RowStorage.take = take
    return results


class Unlucky(MeanMetric):
    """A metric that fails in one process."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def update(self, p, y):
        if self.rank == 1:
            raise ValueError("no luck")
        super().update(p.max(-1).values)


def averaged_steps(rank):
    """Steps of IVON from gradients of all processes, then from one process's alone.

    Of two parameters, the second is used by one process alone.
    """
    start = torch.tensor([0.5, -1.0], dtype=torch.float64)
    both = w, expert = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    generator = torch.Generator().manual_seed(rank)
    optimizer = IVON(both, 0.1, 20, 0.3, beta2=0.9, sync=True, generator=generator)
    collected = []
    for takes_part in (True, rank == 0):
        with optimizer.sampled_params(train=takes_part):
            optimizer.zero_grad()
            (w.pow(4).sum() + (expert.pow(4).sum() if rank == 0 else 0)).backward()
            none = torch.zeros_like(w)
            collected.append(torch.cat([none if p.grad is None else p.grad for p in both]))
        optimizer.step()
    momentum = torch.cat([optimizer.state[p]["momentum"] for p in both])
    return collected, torch.cat([p.detach() for p in both]), momentum


def trainings(rank, folder):
    """Train with the callback: well, with a disk that is full, and with a broken data set."""
    outcomes = {}
    for case in ("well", "disk", "data"):
        arguments = quiet(
            folder / case,
            per_device_train_batch_size=2,
            per_device_eval_batch_size=2,
            max_steps=2,
        )
        validation = data_of("predict")  # of eight, the second batch of two is process 1's
        data = Broken(validation, 2) if case == "data" else validation[:5]
        model = peft_model("bert", dtype=torch.float32)
        trainer = Trainer(model, arguments, train_dataset=loader().dataset, eval_dataset=data)
        kind = FullDisk if case == "disk" else KronLoraLaplace
        callback = LaplaceCallback(trainer, posterior=kind)
        trainer.add_callback(callback)
        error = outcome_of(lambda trainer=trainer: trainer.train() and None)
        steps = trainer.state.global_step
        logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
        n_data = callback.la and callback.la.n_data
        outcomes[case] = [error, steps, n_data, logged.get("eval_laplace_nll")]
        if case == "well":
            two = callback.predict(validation[:2])  # a batch of process 0's
            whole = DataLoader(validation, batch_size=8)
            expected = callback.la.predict(whole).probs
            outcomes["predicted"] = [callback.predict(validation), two, expected]
    return outcomes


class FullDisk(KronLoraLaplace):
    """A posterior that cannot be saved by the process that saves."""

    _key = ("lora", "kron on a full disk")

    def save_pretrained(self, *args, **kwargs):
        raise OSError("no space left")


def wrapped_model(rank):
    """Fit a model in DistributedDataParallel on shares of different lengths."""
    la = posterior(DistributedDataParallel(peft_model("bert")))
    predict = partial(la.predict, shared_loader("uneven", 4, data_of("predict")[:5]))
    return [outcome_of(partial(CALLS["fit"], la, shared_loader("uneven", 3))), predict().probs]


def brier(p, y):
    return (p - torch.nn.functional.one_hot(y, p.shape[1])).square().sum(-1).mean()


class Deadly(list):
    """Examples, the sixth of which kills the process that fetches it."""

    def __getitem__(self, i):
        if i == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(i)


def after_a_killing():
    """Return what a fit says whose second process is killed in the middle, after how long."""
    la = posterior_of(KronLoraLaplace, loader(7), **LOW)
    before = la(BATCH)
    data = Deadly(loader().dataset)
    sampler = DistributedSampler(data, shuffle=False)  # the odd examples are the second process's
    dist.barrier()
    start = time.monotonic()
    try:
        la.fit(DataLoader(data, batch_size=1, sampler=sampler))
    except RuntimeError as error:
        return {
            "error": str(error),
            "seconds": time.monotonic() - start,
            "kept": torch.equal(la(BATCH), before),
        }


def worker(rank, port, folder):
    """Run as one of the processes; spawned, so it must be importable by name."""
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_RANK": str(rank),
        "ACCELERATE_USE_CPU": "true",
    }
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, timeout=PATIENCE)
    results = scenario_results(rank) | calls_together()
    results |= {"later": failures_after_the_data(rank), "wrapped": wrapped_model(rank)}
    results |= {"ivon": averaged_steps(rank), "trainings": trainings(rank, folder)}
    torch.save(results, folder / f"{rank}.pt")
    torch.save(after_a_killing(), folder / "killing.pt")
    os._exit(0)  # there is no one left to take leave of
