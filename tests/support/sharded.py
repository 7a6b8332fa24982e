"""What each of two processes does with a model that `fully_shard` has cut into pieces."""

import os
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import evaluate
from support.batches import loader, token_batch, validation
from support.models import TARGETS, peft_model
from support.posteriors import LOW
from support.processes import outcome_of

KINDS = {  # how a model is sharded
    "pieces": {},
    "kept gathered": {"reshard_after_forward": False},
    "whole adapters": {"whole_adapters": True},
    "answer tokens": {"name": "llama-lm"},
}
BATCH = token_batch((4, 2), seed=3)


def sharded(model, whole_adapters=False, **options):
    """Shard a model in place, layer by layer."""
    if whole_adapters:
        options["ignored_params"] = {p for p in model.parameters() if p.requires_grad}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def everything(model, folder):
    """Return what a posterior of a model says, by the call."""
    is_decoder = hasattr(model.get_base_model(), "lm_head")
    targets = {"target_ids": TARGETS} if is_decoder else {}
    la = KronLoraLaplace(model, "classification", **LOW, **targets)
    la.fit(loader())
    found = {"fit": la.log_marginal_likelihood().detach(), "call": la(BATCH)}
    for method in ("loo", "marglik"):
        la.optimize_prior_precision(method=method, train_loader=loader())
        found[method] = la.prior_precision.detach()
    la.optimize_prior_precision(method="gridsearch", val_loader=validation())
    found["gridsearch"] = la.prior_precision.detach()
    found["calibrate"] = torch.tensor(la.calibrate(validation()).nll_after)
    found["predict"] = la.predict(validation()).probs
    source = torch.Generator().manual_seed(0)
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
    found["weights sampled"] = la(BATCH, generator=source, **options)
    found["after sampling"] = la(BATCH)
    values = evaluate(la.predict, validation(), bootstrap=3).values.values()
    found["evaluate"] = torch.tensor(list(values))
    la.save_pretrained(folder, precision="exact")
    found["loaded"] = KronLoraLaplace.from_pretrained(model, folder)(BATCH)
    return found, la


def refusals(model, la):
    """Return what is said of work that processes cannot share."""
    data = loader().dataset
    dealt = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))
    before, found = la(BATCH), {}
    found["dealt"] = outcome_of(partial(la.fit, dealt))
    found["predicted"] = outcome_of(partial(la.predict, dealt))
    found["sampled"] = outcome_of(partial(la.predict, validation(), method="sampled"))
    found["kept"] = torch.equal(la(BATCH), before)
    return found


def worker(rank, port, folder):
    """Run as one of the processes; spawned, so it must be importable by name."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for kind, options in KINDS.items():
        options = dict(options)
        model = sharded(peft_model(options.pop("name", "llama")), **options)
        results[kind], la = everything(model, folder / kind)
        if kind == "pieces":
            results["refusals"] = refusals(model, la)
            results["elsewhere"] = KronLoraLaplace.from_pretrained(model, folder / "whole")(BATCH)
            with torch.no_grad():
                la.params[0].add_(1.0)
            results["changed"] = outcome_of(partial(la, BATCH))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(peft_model("llama", dtype=torch.float32), mp_policy=half)
    la = KronLoraLaplace(model, "classification", **LOW)
    results["half precision"] = (
        outcome_of(partial(la.fit, loader())),
        outcome_of(partial(la, BATCH)),
    )
    torch.save(results, folder / f"{rank}.pt")
    os._exit(0)  # without waiting for each other
