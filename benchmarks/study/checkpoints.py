"""Fine-tuned adapters of the studies: trained once, saved, loaded by every method.

A checkpoint is a folder as PEFT saves it. ``training.json`` in it says how it was trained. See
`tasks` for the data, `trainings` for the checkpoints of the studies.
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.harness import kept
from benchmarks.harness.arguments import RESULTS
from benchmarks.study.tasks import Task
from examples import support
from laplace_lora import LogitsModel

BATCH_SIZE = 16


def add_study_arguments(parser: argparse.ArgumentParser, seeds: list[int]) -> None:
    """Add the arguments of fine-tuning and those that every study has.

    Args:
        parser: Where to add them.
        seeds: Default seeds, one per checkpoint.
    """
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training rows")
    parser.add_argument("--rate", type=float, default=1e-3, help="AdamW's, falling to zero")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA on query and value")
    parser.add_argument("--dropout", type=float, default=0.1, help="LoRA's")
    parser.add_argument(
        "--autocast", action="store_true", help="train in bfloat16, with weights in float32"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="one per checkpoint")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder of checkpoints")
    parser.set_defaults(repeats=1, seed=0)


def checkpoint(task: Task, args: argparse.Namespace, seed: int) -> tuple[PeftModel, dict[str, Any]]:
    """Return a fine-tuned model in evaluation mode; trains it if it was not yet.

    Args:
        task: What to train on.
        args: Of `add_study_arguments`.
        seed: Of head, adapter, batch order and dropout.

    Returns:
        The model, and how it was trained: settings, seconds of all epochs, final loss.

    Raises:
        SystemExit: If the folder has a checkpoint of other settings or training rows.
    """
    folder = folder_of(task, args, seed)
    settings = {name: getattr(args, name) for name in ("epochs", "rate", "rank", "dropout")}
    settings |= {"rows": len(task.splits["train"]), "model": Path(task.model).name}
    settings["training rows"] = digest(task.splits["train"])
    record = folder / "training.json"
    if not record.exists():
        model = pretrained(task, args, seed)
        folder.mkdir(parents=True, exist_ok=True)
        trained = train(model, task, args)
        model.save_pretrained(folder)
        kept.write(record, {**settings, "autocast": args.autocast, **trained})
    saved = kept.read(record)
    kept.check(record, saved, settings)
    model = PeftModel.from_pretrained(base_model(task), str(folder), is_trainable=True)
    return model.to(args.device).eval(), saved


def digest(rows: list[dict[str, Any]]) -> str:
    """Return what tells training rows from others, whose validation rows may be among these."""
    content = [[list(map(int, row["input_ids"])), int(row["labels"])] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def folder_of(task: Task, args: argparse.Namespace, seed: int) -> Path:
    """Return where a task's checkpoint of a seed is saved."""
    return Path(args.out) / "checkpoints" / f"{task.name}-{seed}"


def clock_for(device: str) -> Callable[[], float]:
    """Return a device's clock; the CPU's counts this process's time only."""
    return time.process_time if torch.device(device).type == "cpu" else time.perf_counter


def base_model(task: Task) -> torch.nn.Module:
    """Load the pretrained model of a task, a classifier's with a fresh head."""
    if task.target_ids is None:
        return support.load_base(task.model, task.classes)[0]
    if task.model == support.DECODER:
        return copy.deepcopy(_decoder())
    return AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)


@functools.lru_cache(maxsize=1)
def _decoder() -> torch.nn.Module:
    """Return the packaged decoder, which takes seconds to read, and is read often."""
    return support.load_decoder()[0]


def pretrained(task: Task, args: argparse.Namespace, seed: int) -> PeftModel:
    """Return the pretrained model with fresh adapters on query and value, and a fresh head."""
    set_seed(seed)
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
    config = LoraConfig(
        task_type="SEQ_CLS" if task.target_ids is None else "CAUSAL_LM",
        r=args.rank,
        lora_alpha=2 * args.rank,
        lora_dropout=args.dropout,
    )
    return get_peft_model(base_model(task), config).to(args.device)


def training_loader(
    task: Task, args: argparse.Namespace, optimizer: torch.optim.Optimizer
) -> tuple[DataLoader, torch.optim.lr_scheduler.LRScheduler]:
    """Return the batches of a training, of texts of like length, and the schedule of its rate."""
    rows = task.splits["train"]
    lengths = [len(row["input_ids"]) for row in rows]
    sampler = LengthGroupedSampler(BATCH_SIZE, lengths=lengths)
    loader = DataLoader(rows, BATCH_SIZE, sampler=sampler, collate_fn=task.collate)
    steps = args.epochs * len(loader)
    return loader, get_linear_schedule_with_warmup(optimizer, steps // 20, steps)


def train(model: PeftModel, task: Task, args: argparse.Namespace) -> dict[str, float]:
    """Fine-tune with AdamW on the cross-entropy of the classes or answers."""
    logits = LogitsModel(model, task.target_ids)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.rate)
    loader, schedule = training_loader(task, args, optimizer)

    def loss_of(batch: dict[str, Tensor]) -> Tensor:
        with torch.autocast(str(args.device), torch.bfloat16, enabled=args.autocast):
            output = logits(batch)
        return F.cross_entropy(output, batch["labels"].to(output.device))

    clock = clock_for(args.device)
    started = clock()
    loss = support.train(model, loader, args.epochs, optimizer, schedule, loss_of, progress=None)
    return {"seconds": clock() - started, "final loss": loss}
