"""Tasks, training loops and evaluation of the adaptive-rank benchmark."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_matthews_corrcoef
from transformers import DataCollatorWithPadding, get_linear_schedule_with_warmup

from benchmarks.harness.timing import Run, time_in_turn
from examples import support
from laplace_lora.adaptive import CRITERIA as KNOWN
from laplace_lora.adaptive import IVON, PosteriorScore, SensitivityScore, set_importance_score
from laplace_lora.evaluation import MAP, evaluate

CRITERIA = tuple(KNOWN)
TARGETS = ["query", "key", "value"]
LORA_RATE, ADALORA_RATE = 2e-3, 1e-2  # of AdamW; AdaLoRA's singular values start at zero
IVON_SETTINGS: dict[str, dict[str, Any]] = {
    # hess_init and the second beta of the paper's scripts: h stays where it starts.
    "vilora": {"hess_init": 1.0, "betas": (0.9, 0.99999), "lr": 100.0, "clip_radius": 1e-4},
    "informative": {"hess_init": 1e-3, "betas": (0.9, 0.98), "lr": 10.0, "clip_radius": 1e-3},
}
SAMPLES = 1e6  # effective sample size; a few hundred would drown the steps in noise


@dataclass(frozen=True)
class Task:
    """A data set, cut to size."""

    name: str
    model: str
    classes: int
    train_loader: DataLoader
    test_loader: DataLoader


def load_task(args: argparse.Namespace, name: str, seed: int) -> Task:
    """Read and tokenise a task: ``train`` is sampled by the seed, ``dev`` is held out."""
    folder = args.data / name
    train_file = next(p for p in sorted(folder.glob("train.jsonl*")))
    train_rows, names = support.read_rows(train_file)
    test_rows, _ = support.read_rows(folder / "dev.jsonl")
    random.Random(seed).shuffle(train_rows)
    random.Random(0).shuffle(test_rows)
    model = args.model or support.encoder_path()
    _, tokenizer = support.load_base(model, len(names))
    collate = DataCollatorWithPadding(tokenizer)
    train, test = (
        support.encode(rows[:size], tokenizer, args.max_tokens)
        for rows, size in ((train_rows, args.train_size), (test_rows, args.test_size))
    )
    generator = torch.Generator().manual_seed(seed)
    return Task(
        name,
        model,
        len(names),
        DataLoader(train, args.batch, shuffle=True, collate_fn=collate, generator=generator),
        DataLoader(test, 64, collate_fn=collate),
    )


def pretrained(task: Task) -> nn.Module:
    """Load the encoder with a fresh head and without dropout."""
    base, _ = support.load_base(task.model, task.classes)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return base


def train_lora(task: Task, args: argparse.Namespace, seed: int) -> PeftModel:
    """Fine-tune with LoRA and AdamW."""
    torch.manual_seed(seed)
    task.train_loader.generator.manual_seed(seed)  # every method sees the same batches
    base = pretrained(task)
    config = LoraConfig(
        task_type="SEQ_CLS", r=args.init_rank, lora_alpha=2 * args.init_rank, target_modules=TARGETS
    )
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(trained(model), lr=LORA_RATE)
    steps = args.epochs * len(task.train_loader)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)

    def loss_of(batch: Any) -> Tensor:
        with autocast(args):
            return model(**batch).loss

    support.train(
        model, task.train_loader, args.epochs, optimizer, schedule, loss_of, progress=None
    )
    return model


def adalora(task: Task, args: argparse.Namespace, seed: int, rank: float, steps: int) -> PeftModel:
    """Build an AdaLoRA model whose schedule fits the number of steps."""
    torch.manual_seed(seed)
    base = pretrained(task)
    config = AdaLoraConfig(
        task_type="SEQ_CLS",
        init_r=args.init_rank,
        target_r=int(rank),
        lora_alpha=2 * args.init_rank,
        target_modules=TARGETS,
        tinit=steps // 5,
        tfinal=max(1, 3 * steps // 10),
        deltaT=max(1, steps // 20),
        total_step=steps,
        orth_reg_weight=0.1,
    )
    return get_peft_model(base, config).train()


def train_adalora(
    task: Task, args: argparse.Namespace, seed: int, setting: str, criterion: str, rank: float
) -> tuple[PeftModel, Optimizer]:
    """Fine-tune with AdaLoRA; return the model and its optimiser."""
    steps = args.epochs * len(task.train_loader)
    task.train_loader.generator.manual_seed(seed)  # every method sees the same batches
    model = adalora(task, args, seed, rank, steps)
    step, optimizer, _ = training_step(model, args, setting, criterion)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    number = 0
    for _ in range(args.epochs):
        for batch in task.train_loader:
            step(batch, number)
            schedule.step()
            number += 1
    return model.eval(), optimizer


def training_step(
    model: PeftModel, args: argparse.Namespace, setting: str, criterion: str
) -> tuple[Callable[[Any, int], None], Optimizer, Any]:
    """Return a function that trains on one batch and allocates, with its optimiser and score."""
    optimizer: Any
    if setting == "adamw":
        optimizer = torch.optim.AdamW(trained(model), lr=ADALORA_RATE)
    else:
        optimizer = IVON(trained(model), ess=SAMPLES, **IVON_SETTINGS[setting])
    by_posterior = criterion != "sensitivity"
    score = PosteriorScore(optimizer, criterion) if by_posterior else SensitivityScore()
    set_importance_score(model, score)

    def gradients(batch: Any) -> None:
        with autocast(args):
            loss = model(**batch).loss
        loss.backward()

    def step(batch: Any, number: int) -> None:
        if isinstance(optimizer, IVON):
            with optimizer.sampled_params(train=True):
                gradients(batch)
        else:
            gradients(batch)
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()

    return step, optimizer, score


def autocast(args: argparse.Namespace) -> torch.autocast:
    """Return the context of a training's forward passes."""
    return torch.autocast(args.device, torch.bfloat16, enabled=args.autocast)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return what an optimiser gets; PEFT's rank counts are no parameters."""
    return [p for n, p in model.named_parameters() if p.requires_grad and "ranknum" not in n]


def scores(model: nn.Module, loader: DataLoader) -> dict[str, float]:
    """Return the metrics of a classifier's probabilities."""
    report = evaluate(MAP(model), loader, bootstrap=2)
    p, y = report.probs, report.labels
    matthews = multiclass_matthews_corrcoef(p, y, p.shape[1]).item()
    return {**{name: report[name] for name in support.SHOWN}, "matthews": matthews}


def persistent_bytes(model: nn.Module, optimizer: Optimizer, score: Any) -> float:
    """Return what optimiser and score store between steps, in bytes per trained weight."""
    stored: list[Tensor] = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor) and value.ndim
    ]
    stored += [tensor for pair in getattr(score, "averages", {}).values() for tensor in pair]
    return sum(tensor.nbytes for tensor in stored) / sum(p.numel() for p in trained(model))


def step_seconds(
    task: Task, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Time training steps of both optimisers, masking included; and count what they store."""
    batches = list(task.train_loader)[:10]
    runs: dict[str, Run] = {}
    stored: dict[str, Callable[[], float]] = {}
    for name, setting, criterion in (
        ("AdamW, sensitivity", "adamw", "sensitivity"),
        ("IVON, snr_magnitude", "informative", "snr_magnitude"),
    ):
        model = adalora(task, args, 0, min(args.ranks), steps=1000)
        config = model.peft_config["default"]
        config.tinit, config.deltaT = 0, 5
        step, optimizer, score = training_step(model, args, setting, criterion)

        def run(step: Callable[[Any, int], None] = step) -> None:
            for number, batch in enumerate(batches, start=1):
                step(batch, number)

        def used(model: Any = model, optimizer: Any = optimizer, score: Any = score) -> float:
            return persistent_bytes(model, optimizer, score)

        runs[name], stored[name] = run, used
    rounds = argparse.Namespace(**{**vars(args), "repeats": max(5, args.repeats)})
    seconds = time_in_turn(runs, rounds)
    return seconds, {name: count() for name, count in stored.items()}


def data_folder(text: str) -> Path:
    """Check that a folder of tasks exists."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return path
