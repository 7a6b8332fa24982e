"""IVON in a `Trainer` over two processes trains as in one."""

import os

import pytest
import torch
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import DataCollatorWithPadding, Trainer, default_data_collator

from laplace_lora.adaptive import IVON, IVONCallback
from laplace_lora.adaptive.shared_draws import share_draws
from support.batches import token_batch
from support.models import peft_model
from support.spawned import exit_codes
from support.texts import word_tokenizer
from support.trainers import quiet

ALIKE, VARIED = (5,) * 24, tuple(2 + (7 * i) % 9 for i in range(24))


class InOrder(Trainer):
    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def rows(lengths, kind="bert"):
    texts = [
        ids[:n].tolist() for ids, n in zip(token_batch(lengths)["input_ids"], lengths, strict=True)
    ]
    if kind == "llama-lm":  # whose loss divides by the number of items
        return [{"input_ids": text, "labels": text} for text in texts]
    return [{"input_ids": text, "labels": n % 3} for n, text in enumerate(texts)]


def trained(
    folder,
    batch_size,
    lengths,
    dropout,
    generator=None,
    steps=1,
    kind="bert",
    resume=None,
    **options,
):
    """Train a tiny model; return weights, curvature and momentum."""
    model = peft_model(kind, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    parameters = [p for p in model.parameters() if p.requires_grad]
    betas = {"betas": (0.9, 0.9), "hess_init": 0.5, "clip_radius": 1.0}
    ivon = IVON(parameters, lr=0.05, ess=24, generator=generator, **betas)
    settings = {"max_steps": 4, "max_grad_norm": 0, "lr_scheduler_type": "constant", **options}
    settings |= {"per_device_train_batch_size": batch_size, "gradient_accumulation_steps": steps}
    pads = DataCollatorWithPadding(word_tokenizer())
    InOrder(
        model,
        quiet(folder, **settings),
        train_dataset=rows(lengths, kind),
        data_collator=pads if kind == "bert" else default_data_collator,
        optimizers=(ivon, None),
        callbacks=[IVONCallback()],
    ).train(resume_from_checkpoint=resume)
    states = [ivon.state[p] for p in parameters]
    found = [parameters, *([state[name] for state in states] for name in ("hessian", "momentum"))]
    return [torch.cat([t.detach().flatten() for t in tensors]) for tensors in found]


def worker(rank, port, folder):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
    os.environ.update(address, RANK=str(rank), WORLD_SIZE="2", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    gloo = {"ddp_backend": "gloo"}
    found = {
        steps: trained(folder, 3 // steps, ALIKE, 0.0, seeded(), steps, **gloo) for steps in (1, 3)
    }
    found["dropout"] = trained(folder, 3, VARIED, 0.1, **gloo)
    whole = {"save_strategy": "steps", "save_steps": 2, **gloo}
    found["whole"] = trained(folder, 3, ALIKE, 0.0, **whole)
    found["resumed"] = trained(folder, 3, ALIKE, 0.0, resume=str(folder / "checkpoint-2"), **gloo)
    found["seeds"] = [torch.tensor(seed_at(step)) for step in (0, 2)]
    for over_all in (True, False):
        counted = {"kind": "llama-lm", "average_tokens_across_devices": over_all, **gloo}
        found["counted", over_all] = trained(folder, 1, ALIKE, 0.0, seeded(), 3, **counted)
    torch.save(found, folder / f"{rank}.pt")
    with pytest.raises(ValueError, match="generators differ"):
        share_draws(IVON([nn.Parameter(torch.ones(1))], ess=1, generator=seeded(rank)), 0)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def seed_at(step):
    """The seed of a training that begins at a step, after the trainer has set its own."""
    torch.manual_seed(0)
    ivon = IVON([nn.Parameter(torch.ones(1))], ess=1)
    share_draws(ivon, step)
    return ivon.generator.initial_seed()


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    assert exit_codes(worker, tmp_path) == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for key, of_first in first.items():
        for ours, theirs in zip(of_first, second[key], strict=True):
            assert torch.equal(ours, theirs)
    expected = trained(tmp_path, 6, ALIKE, 0.0, seeded())
    for steps in (1, 3):
        for ours, alone in zip(first[steps], expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)
    expected = trained(tmp_path, 6, ALIKE, 0.0, seeded(), kind="llama-lm")
    for over_all in (True, False):
        for ours, alone in zip(first["counted", over_all], expected, strict=True):
            torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-5)
    for whole, resumed in zip(first["whole"], first["resumed"], strict=True):
        assert torch.equal(whole, resumed)
    assert first["seeds"][0] != first["seeds"][1]  # a checkpoint of one process has no generator
