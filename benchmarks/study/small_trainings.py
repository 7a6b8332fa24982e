"""What the studies that train an encoder on rows of their own have in common."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from benchmarks.harness.arguments import RESULTS, plain_parser
from examples import support
from laplace_lora.posteriors.base import LoraLaplace

BATCH = 16
WAYS: dict[str, dict[str, Any]] = {
    "leave-one-out": {"method": "loo"},
    "evidence": {"method": "marglik"},
}
Probabilities = Callable[[Any], Tensor]


def split_loaders(
    rows: list[dict[str, Any]], sizes: Mapping[str, int], tokenizer: Any, max_tokens: int
) -> dict[str, DataLoader]:
    """Return batches of the splits, which take their rows one after the other.

    Args:
        rows: Texts and labels.
        sizes: How many rows each split has.
        tokenizer: Of the model.
        max_tokens: Longer texts are cut.
    """
    collate = support.DataCollatorWithPadding(tokenizer)
    loaders, start = {}, 0
    for split, size in sizes.items():
        encoded = support.encode(rows[start : start + size], tokenizer, max_tokens)
        loaders[split] = DataLoader(encoded, BATCH, collate_fn=collate)
        start += size
    return loaders


def train(model: PeftModel, loader: DataLoader, epochs: int, rate: float) -> float:
    """Fine-tune with AdamW; return the last training loss."""
    shuffled = DataLoader(loader.dataset, BATCH, shuffle=True, collate_fn=loader.collate_fn)
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate)
    steps = epochs * len(shuffled)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    loss = support.train(
        model, shuffled, epochs, optimizer, schedule, lambda x: model(**x).loss, progress=None
    )
    model.eval()
    return loss


def judged(method: Probabilities, loader: Iterable[Any]) -> dict[str, float]:
    """Return a method's mean NLL of labelled rows in nats, and its accuracy."""
    losses, right = [], []
    for batch in loader:
        p, y = method(batch).double(), batch["labels"]
        losses.append(F.nll_loss(p.log(), y, reduction="none"))
        right.append((p.argmax(1) == y).double())
    return {"NLL": float(torch.cat(losses).mean()), "accuracy": float(torch.cat(right).mean())}


def tuned(la: LoraLaplace, way: dict[str, Any]) -> dict[str, Any]:
    """Tune a posterior's prior by one of `WAYS`; return processor time and what was found."""
    started = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # it says that the evidence is too wide
        la.optimize_prior_precision(**way)
    return {"seconds": time.process_time() - started, "tuning": str(la.tuning)}


def figures_parser(description: str | None, only: str) -> argparse.ArgumentParser:
    """Return a parser of where figures are kept, and which of them are asked for.

    Args:
        description: Of the study.
        only: An example of names of trainings.
    """
    parser = plain_parser(description)
    parser.add_argument("--out", type=Path, default=RESULTS / "study", help="folder of figures")
    parser.add_argument("--only", nargs="+", default=[""], help=f"such as {only}")
    parser.add_argument("--report", action="store_true", help="only report what is finished")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.set_defaults(repeats=1, seed=0, device="cpu")
    return parser
