"""What each of two processes does with a model that `fully_shard` has cut into pieces."""

import os
import signal
import time
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM

from laplace_lora import FullLoraLLLaplace, FunctionalLoraLLLaplace, KronLoraLaplace
from laplace_lora.data.distributed import together
from laplace_lora.evaluation import evaluate
from laplace_lora.generation import generate, score
from support.batches import loader, token_batch, validation
from support.dealt import cases, said_of, surprised
from support.generation import FIELDS
from support.interruptions import Interruption
from support.language import EXACT, text_batch, text_loader
from support.models import TARGETS, peft_model
from support.posteriors import LOW
from support.processes import outcome_of
from support.shared_calls import Broken

KINDS = {  # how a model is sharded, and who reads the data
    "pieces": {},
    "kept gathered": {"reshard_after_forward": False},
    "whole adapters": {"whole_adapters": True},
    "answer tokens": {"name": "llama-lm"},
    "dealt out": {},
    "accelerate": {"name": "llama-lm"},
}
BATCH = token_batch((4, 2), seed=3)


def sharded(model, whole_adapters=False, **options):
    """Shard a model in place, layer by layer."""
    if whole_adapters:
        options["ignored_params"] = {p for p in model.parameters() if p.requires_grad}
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def accelerated(model):
    """Return a model sharded by accelerate's plugin, and what deals loaders out to processes."""
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
    )
    accelerator = Accelerator(cpu=True)
    accelerator.state.fsdp_plugin = plugin  # on a CPU, `prepare` would take DistributedDataParallel
    return fsdp2_prepare_model(accelerator, model), accelerator.prepare


def dealt(plain):
    """Deal a loader's examples out, the last of which are repeats."""
    data = plain.dataset
    return DataLoader(data, batch_size=2, sampler=DistributedSampler(data, shuffle=False))


def everything(model, folder, share=lambda data: data):
    """Return what a posterior of a model says, by the call.

    Args:
        model: The model.
        folder: Where the posterior is saved.
        share: From a loader of all data to the one that a process reads.
    """
    is_decoder = hasattr(model.get_base_model(), "lm_head")
    targets = {"target_ids": TARGETS} if is_decoder else {}
    la = KronLoraLaplace(model, "classification", **LOW, **targets)
    la.fit(share(loader()))
    found = {"fit": la.log_marginal_likelihood().detach(), "call": la(BATCH)}
    for method in ("loo", "marglik"):
        la.optimize_prior_precision(method=method, train_loader=share(loader()))
        found[method] = la.prior_precision.detach()
    la.optimize_prior_precision(method="gridsearch", val_loader=share(validation()))
    found["gridsearch"] = la.prior_precision.detach()
    options = {"link_approx": "mc", "n_samples": 20}
    seeded = torch.Generator().manual_seed(0)
    report = la.calibrate(share(validation()), generator=seeded, **options)
    found["calibrate"] = torch.tensor(report.nll_after)
    found["predict"] = la.predict(share(validation())).probs
    source = torch.Generator().manual_seed(0)
    options = {"pred_type": "nn", "link_approx": "mc", "n_samples": 3}
    found["weights sampled"] = la(BATCH, generator=source, **options)
    found["after sampling"] = la(BATCH)
    values = evaluate(la.predict, share(validation()), bootstrap=3).values.values()
    found["evaluate"] = torch.tensor(list(values))
    la.save_pretrained(folder, precision="exact")
    found["loaded"] = KronLoraLaplace.from_pretrained(model, folder)(BATCH)
    return found, la


def last_layer(model, share=lambda data: data):
    """Return how a last-layer posterior of a model scores, by either way of asking it."""
    la = FullLoraLLLaplace(model, "classification")
    la.fit(share(loader()))
    scored = [evaluate(how, share(validation()), bootstrap=2) for how in (la, la.predict)]
    return torch.tensor([list(report.values.values()) for report in scored])


def process(model):
    """Return a Gaussian process on the features of a model, not fitted."""
    return FunctionalLoraLLLaplace(model, "classification", n_subset=5, prior_precision=2.0)


def said_by(la):
    """Return predictions and evidence, ``(numbers,)``."""
    return torch.cat([la(BATCH).flatten(), la.log_marginal_likelihood().reshape(1)])


def processes():
    """Return what processes on a sharded model and a whole one say, and of each other's state."""
    pieces, plain = process(sharded(peft_model("llama"))), process(peft_model("llama"))
    pieces.fit(dealt(loader()))
    plain.fit(loader())
    found = [said_by(pieces), said_by(plain)]
    for la, other in ((pieces, plain), (plain, pieces)):
        again = process(la.features.source)
        again.load_state_dict(other.state_dict())
        found.append(said_by(again))
    return found


def language(model):
    """Return what a posterior says of texts, by the call; what is drawn is among the rest."""
    la = KronLoraLaplace(model, "language_modeling", **EXACT)
    la.fit(text_loader())
    found = {"fit": la.log_marginal_likelihood().detach()}
    la.optimize_prior_precision(method="marglik", train_loader=text_loader())
    found["marglik"] = la.prior_precision.detach()
    la.prior_precision = 3.0
    scored = score(la, text_batch(), 4, method="exact")
    prompts = text_batch()["input_ids"][:, :3]
    options = {"method": "exact", "eos_token_id": []}
    written = generate(la, prompts, 4, 4, **options)
    for name in FIELDS:
        found[f"score {name}"] = getattr(scored, name)
        found[f"generate {name}"] = getattr(written, name)
    found["tokens"] = written.tokens.double()
    drawn = generate(la, prompts, 4, 4, do_sample=True, **options).tokens.double()
    sampled = KronLoraLaplace(model, "language_modeling")  # labels are drawn
    sampled.fit(text_loader())
    return found, [drawn, sampled.log_marginal_likelihood().detach()], la


def refusals(model, la):
    """Return what is said of work that sharded models cannot do."""
    before, found = la(BATCH), {}
    found["sampled"] = outcome_of(partial(la.predict, validation(), method="sampled"))
    with together(dealt(loader())):  # whoever does not say which model runs
        found["dealt"] = outcome_of(partial(la.logits_model, BATCH))
    data = loader().dataset
    broken = DataLoader(Broken(data, 4) if dist.get_rank() else data, batch_size=2)
    found["broken"] = outcome_of(partial(la.fit, broken))
    found["kept"] = torch.equal(la(BATCH), before)
    return found


def tensor_parallel(folder):
    """Return what is said of models divided by transformers' plan, and by a plan of one's own."""
    own = peft_model("llama")
    for layer in own.get_base_model().model.layers:
        parallelize_module(layer.mlp.up_proj, init_device_mesh("cpu", (2,)), ColwiseParallel())
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", tp_plan="auto")
    adapters = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    make = partial(KronLoraLaplace, likelihood="classification", target_ids=TARGETS)
    return [
        outcome_of(lambda: make(get_peft_model(model, adapters))),
        outcome_of(lambda: KronLoraLaplace(own, "classification")),
    ]


class Cut(DataLoader):
    """Stops before a batch, in each process before another one."""

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == 1 + dist.get_rank():
                raise Interruption
            yield batch


def resumed(folder):
    """Return the evidence of a fit of shared data that was interrupted, and what stopped it."""
    la = KronLoraLaplace(sharded(peft_model("llama")), "classification", **LOW)
    data = loader().dataset
    options = {"batch_size": 1, "sampler": DistributedSampler(data, shuffle=False)}
    kept = {"checkpoint_dir": folder / "sums", "checkpoint_every": 1}
    said = outcome_of(lambda: la.fit(Cut(data, **options), **kept))
    files = len(list((folder / "sums").iterdir()))
    la.fit(DataLoader(data, **options), **kept)
    return said, files, la.log_marginal_likelihood().detach()


def after_a_killing(rank):
    """Return what a fit says whose second process dies in the middle of a pass, and after what."""
    model = sharded(peft_model("llama"))
    la = KronLoraLaplace(model, "classification", **LOW)
    la.fit(loader())
    before, calls = la.state, []

    def die(*_):
        calls.append(1)
        if rank == 1 and len(calls) == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(die)
    start = time.monotonic()
    said = outcome_of(partial(la.fit, loader(1)))
    return {"said": said, "seconds": time.monotonic() - start, "kept": la.state is before}


def worker(rank, port, folder):
    """Run as one of the processes; spawned, so it must be importable by name."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
    os.environ["ACCELERATE_USE_CPU"] = "true"
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for kind, options in KINDS.items():
        options, share = dict(options), dealt if kind == "dealt out" else lambda data: data
        model = peft_model(options.pop("name", "llama"))
        if kind == "accelerate":
            model, share = accelerated(model)
        else:
            model = sharded(model, **options)
        results[kind], la = everything(model, folder / kind, share)
        if kind == "pieces":
            results["refusals"] = refusals(model, la)
            results["elsewhere"] = KronLoraLaplace.from_pretrained(model, folder / "whole")(BATCH)
            with torch.no_grad():
                la.params[0].add_(1.0)
            results["changed"] = outcome_of(partial(la, BATCH))
    found, drawn, la = language(sharded(peft_model("llama-lm")))
    results |= {"language": found, "drawn": drawn}
    results["by samples"] = outcome_of(partial(score, la, text_batch(), 4))
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = sharded(peft_model("llama", dtype=torch.float32), mp_policy=half)
    la = KronLoraLaplace(model, "classification", **LOW)
    results["half precision"] = (
        outcome_of(partial(la.fit, loader())),
        outcome_of(partial(la, BATCH)),
    )
    results["last layer"] = last_layer(sharded(peft_model("llama")), dealt)
    results["processes"] = processes()
    results["resumed"] = resumed(folder)
    results["dealt"] = {case: outcome_of(partial(said_of, case)) for case in cases()}
    results["surprised"] = surprised(rank)
    results["tensor parallel"] = tensor_parallel(folder)
    torch.save(results, folder / f"{rank}.pt")
    torch.save(after_a_killing(rank), folder / "killing.pt")
    os._exit(0)  # without waiting for each other
