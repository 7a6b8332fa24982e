"""Fits of data that each process has cut to its part by itself, and of what only looks so."""

import os
import warnings
from datetime import timedelta
from functools import partial

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Subset

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import evaluate
from support.batches import loader, validation
from support.models import peft_model
from support.posteriors import LOW
from support.processes import outcome_of

COUNT = 8  # so that lengths tell nothing


def data():
    return [*loader().dataset, *validation().dataset][:COUNT]


def hugging_face(rows):
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]}
    return datasets.Dataset.from_dict(columns).with_format("torch")


CUT = {
    "by node": lambda rows, rank: split_dataset_by_node(hugging_face(rows), rank, 2),
    "shard": lambda rows, rank: hugging_face(rows).shard(2, rank, contiguous=False),
    "subset": lambda rows, rank: Subset(rows, range(rank, len(rows), 2)),
    "list": lambda rows, rank: rows[rank::2],
    "uneven": lambda rows, rank: rows[rank:7:2],
}


def said_by(call):
    """Return what a call warns of."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in said]


def fitted(rows, batch_size=2):
    la = KronLoraLaplace(peft_model("bert"), "classification", **LOW)
    la.fit(DataLoader(rows, batch_size))
    return la


def worker(rank, port, folder):
    """Run as one of two processes; spawned, so it must be importable by name."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    rows, found = data(), {}
    for kind, cut in CUT.items():
        dist.barrier()
        found[kind] = outcome_of(lambda cut=cut: said_by(lambda: fitted(cut(rows, rank))))
    if rank == 0:
        found["one alone"] = fitted(rows[:3]).n_data
    la = fitted(rows[::-1] if rank else rows)  # all of them, in an order of its own
    found["reordered"] = [la.n_data, la.log_marginal_likelihood().detach()]
    found["predicted"] = outcome_of(lambda: la.predict(DataLoader(rows[rank::2], 2)).probs)
    calls = {
        "gridsearch": partial(la.optimize_prior_precision, method="gridsearch"),
        "calibrate": la.calibrate,
        "evaluate": lambda val_loader: evaluate(la.predict, val_loader, bootstrap=2),
    }
    for name, call in calls.items():
        dist.barrier()
        part = DataLoader(rows[rank::2], 2)
        found[name] = outcome_of(
            lambda call=call, part=part: said_by(lambda: call(val_loader=part))
        )
    with torch.no_grad():  # a model of its own, on data of its own
        own = peft_model("bert")
        next(p for p in own.parameters() if p.requires_grad).add_(rank)
    apart = KronLoraLaplace(own, "classification", **LOW)
    apart.fit(DataLoader(rows[rank::2], 2))
    found["other model"] = apart.n_data
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)
