"""Streams of examples: with and without parts for workers and processes."""

import os
from datetime import timedelta
from functools import partial

import datasets
import torch
import torch.distributed as dist
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import Trainer

from laplace_lora import KronLoraLaplace, LaplaceCallback
from laplace_lora.evaluation import evaluate
from support.batches import loader, validation
from support.models import peft_model
from support.posteriors import LOW
from support.processes import outcome_of
from support.trainers import quiet

PARTS = ("by rank", "by rank, two workers", "by node", "by shard", "dispatched")
PARTS += ("dispatched, split", "dispatched, two workers", "filled up", "filled up, split")


def examples(count=7):
    return [*loader().dataset, *validation().dataset][:count]


class Stream(IterableDataset):
    """Examples without a length.

    Args:
        data: The examples.
        part: Which of how many processes' part is read.
        divides: Whether workers divide it among them.
        seeds: From the number of a worker to the seed of its order.
        fails_at: The place of an example that cannot be read.
    """

    def __init__(self, data, part=(0, 1), divides=True, seeds=None, fails_at=None):
        self.data, self.part, self.divides, self.seeds = data, part, divides, seeds
        self.fails_at = fails_at

    def __iter__(self):
        (start, step), worker = self.part, get_worker_info()
        places = list(range(len(self.data)))
        if self.seeds is not None:
            seed = self.seeds(0 if worker is None else worker.id)
            places = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
        places = list(places)[start::step]
        if worker is not None and self.divides:
            places = places[worker.id :: worker.num_workers]
        for place in places:
            if int(place) == self.fails_at:
                raise ValueError("this example cannot be read")
            yield self.data[int(place)]


def streamed(data=None, batch_size=2, workers=0, **options):
    data = examples() if data is None else data
    # A process that was spawned would spawn its workers, too.
    start = {"multiprocessing_context": "fork"} if workers else {}
    return DataLoader(Stream(data, **options), batch_size, num_workers=workers, **start)


def hugging_face(data, shards=3):
    """The same examples as a stream of Hugging Face's."""
    columns = {name: [example[name].tolist() for example in data] for name in data[0]}
    return datasets.Dataset.from_dict(columns).with_format("torch").to_iterable_dataset(shards)


def parts(kind, data, rank, **stream):
    """Return the loader of one of two processes."""
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    workers = 2 if "workers" in kind else 0
    if kind.startswith("by rank"):
        return streamed(data, workers=workers, part=(rank, 2), **stream)
    if kind == "by node":
        return DataLoader(split_dataset_by_node(hugging_face(data), rank, 2), batch_size=2)
    plain = streamed(data, workers=workers, **stream)
    if kind == "by shard":
        plain = DataLoader(hugging_face(data), batch_size=2)
    config = DataLoaderConfiguration(
        dispatch_batches=kind.startswith("dispatched"), split_batches="split" in kind
    )
    return Accelerator(cpu=True, dataloader_config=config).prepare(plain)


def posterior(data):
    la = KronLoraLaplace(peft_model("bert"), "classification", **LOW)
    la.fit(data)
    return la


def by_label(predictions):
    """Return probabilities and labels, sorted by the former."""
    rows = torch.cat([predictions.probs, predictions.labels.unsqueeze(1)], dim=1)
    return rows[rows[:, 0].argsort()]


def everything(train, valid):
    """Return what a posterior says that sees streams only, by the call."""
    la = posterior(train())
    found = {"count": torch.tensor(float(la.n_data)), "fit": la.log_marginal_likelihood().detach()}
    for method in ("loo", "marglik"):
        la.optimize_prior_precision(method=method, train_loader=train())
        found[method] = la.prior_precision.detach()
    la.optimize_prior_precision(method="gridsearch", val_loader=valid())
    found["gridsearch"] = la.prior_precision.detach()
    options = {"link_approx": "mc", "n_samples": 20, "generator": torch.Generator().manual_seed(0)}
    found["calibrate"] = torch.tensor(la.calibrate(valid(), **options).nll_after)
    found["predict"] = by_label(la.predict(valid()))
    report = evaluate(la.predict, valid(), bootstrap=3)
    found["evaluate"] = torch.tensor([report["accuracy"], report["NLL"], report["ECE"]])
    return found


def few_of(la, data):
    """Return how many examples a look at a part of the data takes."""
    from laplace_lora.tuning import width_check

    width_check.EXAMPLES = 2
    la.optimize_prior_precision(method="marglik", train_loader=data)
    width_check.EXAMPLES = 128
    return la.prior_precision.detach()


def trained(train, valid, folder):
    """Return how many examples the callback of a trainer counts, and its validation NLL."""
    arguments = quiet(
        folder / "trainer",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=2,
        max_steps=1,
    )
    model = peft_model("bert", dtype=torch.float32)
    trainer = Trainer(model, arguments, train_dataset=Stream(train), eval_dataset=Stream(valid))
    callback = LaplaceCallback(trainer, strict=True)
    trainer.add_callback(callback)
    trainer.train()
    logged = {k: v for entry in trainer.state.log_history for k, v in entry.items()}
    return callback.la.n_data, logged["eval_laplace_nll"], len(callback.predict(Stream(valid)))


def worker(rank, port, folder):
    """Run as one of two processes; spawned, so it must be importable by name."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    train, valid = examples(), list(validation().dataset)
    found = {}
    for kind in PARTS:
        la = posterior(parts(kind, train, rank))
        rows = by_label(la.predict(parts(kind, valid, rank)))
        found[kind] = [la.n_data, la.log_marginal_likelihood().detach(), rows]
    for kind in ("by rank", "dispatched"):
        calls = partial(parts, kind, train, rank), partial(parts, kind, valid, rank)
        found[f"everything {kind}"] = outcome_of(partial(everything, *calls))
        found[f"few {kind}"] = few_of(la, parts(kind, train, rank))
        bad = parts(kind, train, rank, fails_at=4)
        found[f"unreadable {kind}"] = outcome_of(partial(la.fit, bad))
    alone = posterior(streamed(train))  # every process reads all of it
    found["alone"] = [alone.n_data, alone.log_marginal_likelihood().detach()]
    if rank == 0:  # once known, a process may read it by itself
        found["only one"] = len(alone.predict(alone._train_loader))
    shuffled = streamed(examples(15), seeds=lambda _: rank)
    found["shuffled"] = outcome_of(partial(la.fit, shuffled))
    found["kept"] = la.n_data
    one = streamed(train if rank == 0 else [])
    found["empty"] = posterior(one).n_data
    found["trained"] = outcome_of(partial(trained, train, valid, folder))
    torch.save(found, folder / f"{rank}.pt")
    os._exit(0)
