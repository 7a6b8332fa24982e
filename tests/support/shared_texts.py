"""What each of two processes does with texts whose tokens have labels, or answers."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from laplace_lora import LoraEF
from laplace_lora.evaluation import evaluate
from support.batches import rows
from support.spans import question_batch, span_posterior
from support.tokens import tagged_batch, tagged_posterior

LENGTHS = (4, 7, 3, 5, 6)  # batches of the processes have different widths
SPANS = (1, 2, 0, 1, 3), (2, 5, 0, 1, 4)


def trimmed(examples):
    """Collate without the padding that all share."""
    batch = default_collate(examples)
    width = int(batch["attention_mask"].sum(1).max())
    return {k: v[:, :width] if v.ndim == 2 else v for k, v in batch.items()}


def texts(batch, shared):
    examples = [rows(batch, n) for n in range(len(LENGTHS))]
    sampler = DistributedSampler(examples, shuffle=False) if shared else None
    return DataLoader(examples, batch_size=2, sampler=sampler, collate_fn=trimmed)


def everything(shared):
    """Return what posteriors say of the texts, by the call."""
    found = {}
    kinds = {
        "tokens": (tagged_posterior, tagged_batch(LENGTHS)),
        "spans": (span_posterior, question_batch(LENGTHS, *SPANS)),
    }
    for kind, (posterior, batch) in kinds.items():
        data = texts(batch, shared)
        la = posterior(fit=False, backend=LoraEF)
        la.fit(data)
        found[f"{kind}, fit"] = la.log_marginal_likelihood().detach()
        predictions = la.predict(data)
        found[f"{kind}, predict"] = predictions.entropy
        found[f"{kind}, labels"] = predictions.labels
        found[f"{kind}, calibrate"] = torch.tensor(la.calibrate(data).nll_after)
        if kind == "tokens":
            values = evaluate(la.predict, data, bootstrap=3).values.values()
            found["evaluate"] = torch.tensor(list(values))
    return found


def worker(rank, port, folder):
    """Run as one of the processes; spawned, so it must be importable by name."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=120))
    torch.save(everything(shared=True), folder / f"{rank}.pt")
    os._exit(0)  # without waiting for each other
