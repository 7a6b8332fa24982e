"""What each of several processes does with a shared loader."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, LowRankLoraLaplace
from laplace_lora.fitting import second_pass
from support.batches import loader, token_batch
from support.models import peft_model
from support.posteriors import LOW

PROCESSES = 2
CORRECTED = {**LOW, "eigenvalue_correction": True}
CASES = [
    (KronLoraLaplace, LOW),
    (KronLoraLaplace, CORRECTED),
    (DiagLoraLaplace, {}),
    (FullLoraLaplace, {"row_dtype": "bfloat16", "storage": "disk"}),
    (LowRankLoraLaplace, {"rank": 25}),
]
BATCH = token_batch((4, 2), seed=3)


def shared_loader(kind, batch_size=2):
    """The same seven examples, dealt out to two processes; an uneven end in every way."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    plain = DataLoader(loader().dataset, batch_size=batch_size)
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
    for kind in ("sampler", "accelerate", "split", "uneven"):
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
    few = DataLoader(
        loader().dataset[:1], batch_size=1, sampler=DistributedSampler(loader().dataset[:1])
    )
    try:
        posterior_of(KronLoraLaplace, few)
    except RuntimeError as error:
        results["few"] = str(error)
    try:
        posterior_of(KronLoraLaplace, shared_loader("dispatched"))
    except TypeError as error:
        results["dispatched"] = str(error)
    return results


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
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    torch.save(scenario_results(rank), folder / f"{rank}.pt")
    torch.save(after_a_killing(), folder / "killing.pt")
    os._exit(0)  # there is no one left to take leave of
