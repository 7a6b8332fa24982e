"""Which importance score allocates ranks best: AdaLoRA with IVON, and pruning after training.

A pretrained encoder (the quickstart's) is fine-tuned on a few hundred examples of CoLA, SST-2 and
RTE, over several seeds, with an adapter on query, key and value. Every method ends at the same
average rank:

* AdaLoRA with AdamW and its sensitivity;
* AdaLoRA with IVON and each criterion, with two settings: ``vilora``, whose curvature hardly leaves
  its start (three criteria), and ``informative``, whose curvature is learned (all at the first
  rank, three at the others);
* LoRA with AdamW, pruned by each criterion of a K-FAC Laplace posterior; nothing is trained after.

The data are folders of ``.jsonl`` files with ``text``, ``text_pair`` and ``label`` under
``--data``. A finished cell is saved under ``--out`` and not computed again. Seconds per step are
measured apart, both sides in one process.

    python -m benchmarks.adaptive.ranks --data DATA --autocast
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Iterator
from typing import Any

from torch import nn

from benchmarks.adaptive.training import (
    CRITERIA,
    IVON_SETTINGS,
    Task,
    data_folder,
    load_task,
    scores,
    step_seconds,
    train_adalora,
    train_lora,
)
from benchmarks.harness import arguments
from benchmarks.harness.kept import figures_of, keep
from benchmarks.harness.report import mean_and_error, verdict, write_report
from benchmarks.harness.timing import ratio
from laplace_lora import KronLoraLaplace
from laplace_lora.adaptive import prune_adapter

SETTINGS = (  # of the command, that a cell depends on
    *("train_size", "test_size", "max_tokens", "model"),
    *("epochs", "batch", "init_rank", "ranks", "autocast"),
)
METRICS = ("accuracy", "matthews", "NLL", "ECE")
LORA = "LoRA, AdamW"
COMPARED = ("sensitivity", "snr_magnitude", "magnitude")  # with both settings, at every rank


def cells(args: argparse.Namespace) -> Iterator[tuple[str, str, str, float]]:
    """Yield optimiser setting, method, criterion and rank of every cell."""
    for rank in args.ranks:
        yield "adamw", "AdaLoRA", "sensitivity", rank
        for setting in IVON_SETTINGS:
            for criterion in ("sensitivity", *CRITERIA):
                everywhere = setting == "informative" and rank == args.ranks[0]
                if everywhere or criterion in COMPARED:
                    yield setting, "AdaLoRA", criterion, rank


def adalora_cell(
    task: Task, args: argparse.Namespace, seed: int, cell: tuple[str, str, str, float]
) -> dict[str, Any]:
    """Train one AdaLoRA model and evaluate it."""
    setting, _, criterion, rank = cell
    model, optimizer = train_adalora(task, args, seed, setting, criterion, rank)
    result = scores(model, task.test_loader)
    if hasattr(optimizer, "curvature_change"):
        result["h/h0 quantiles"] = optimizer.curvature_change().tolist()
    return result


def lora_cells(task: Task, args: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """Train one LoRA model, and evaluate it whole and pruned by every criterion."""
    model = train_lora(task, args, seed)
    la = KronLoraLaplace(model, "classification")
    la.fit(task.train_loader)
    la.optimize_prior_precision()
    results = {f"{LORA}, full rank {args.init_rank}": scores(model, task.test_loader)}
    for rank in args.ranks:
        for criterion in CRITERIA:
            pruned = pruned_copy(model, la, rank, criterion)
            name = f"{LORA}, pruned by {criterion}, rank {rank:g}"
            results[name] = scores(pruned, task.test_loader)
    return results


def pruned_copy(model: nn.Module, la: KronLoraLaplace, rank: float, criterion: str) -> nn.Module:
    """Prune a copy of a model by the posterior of the original."""
    pruned = copy.deepcopy(model)
    originals = {name: p for name, p in model.named_parameters()}
    marginals = la.marginals()

    class OfTheCopy:
        def marginals(self) -> dict[nn.Parameter, Any]:
            return {
                p: marginals[originals[name]]
                for name, p in pruned.named_parameters()
                if originals[name] in marginals
            }

    prune_adapter(pruned, OfTheCopy(), rank, criterion)
    return pruned


def run_cells(args: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Compute what is not there yet; return results by task and seed, then by method."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for seed in range(args.seed, args.seed + args.repeats):
        for name in args.tasks:
            path = args.out / "adaptive" / f"{name}-{seed}.json"
            cell_results = figures_of(path, settings) if path.exists() else {}
            task = load_task(args, name, seed)
            if not any(key.startswith(LORA) for key in cell_results):
                cell_results |= lora_cells(task, args, seed)
                keep(path, settings, cell_results)
            for cell in cells(args):
                setting, method, criterion, rank = cell
                optimiser = "AdamW" if setting == "adamw" else f"IVON {setting}"
                key = f"{method}, {optimiser}, {criterion}, rank {rank:g}"
                if key not in cell_results:
                    random.seed(seed)
                    cell_results[key] = adalora_cell(task, args, seed, cell)
                    keep(path, settings, cell_results)
                    print(f"{name}, seed {seed}: {key}: {cell_results[key]}", flush=True)
            results[f"{name}-{seed}"] = cell_results
    return results


def table(results: dict[str, dict[str, dict[str, Any]]], task: str) -> list[dict[str, Any]]:
    """Average a task's seeds; mean ± standard error."""
    seeds = [cells for key, cells in results.items() if key.rpartition("-")[0] == task]
    return [
        {"method": method}
        | {metric: mean_and_error([cells[method][metric] for cells in seeds]) for metric in METRICS}
        for method in seeds[0]
    ]


def main() -> None:
    parser = arguments.plain_parser(__doc__)
    arguments.add_run_arguments(parser, repeats=3, repeated="seeds; and rounds of the step times")
    arguments.add_clock_argument(parser)
    parser.add_argument(
        "--data", type=data_folder, required=True, help="folder with the tasks' folders"
    )
    parser.add_argument("--tasks", nargs="+", default=["cola", "sst2", "rte"])
    parser.add_argument("--model", help="folder or name of a model; default: the quickstart's")
    parser.add_argument("--train-size", type=int, default=320)
    parser.add_argument("--test-size", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--init-rank", type=int, default=6)
    parser.add_argument("--ranks", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--autocast", action="store_true", help="train in bfloat16")
    parser.add_argument("--no-times", action="store_true", help="skip the step times")
    args = parser.parse_args()
    arguments.prepare(args)
    results = run_cells(args)
    tables = {name: table(results, name) for name in args.tasks}
    raw: dict[str, Any] = {"cells": results}
    if not args.no_times:
        seconds, used = step_seconds(load_task(args, args.tasks[0], args.seed), args)
        cost = ratio(seconds["IVON, snr_magnitude"], seconds["AdamW, sensitivity"])
        tables["Training steps"] = [
            {
                "IVON with snr_magnitude over AdamW with sensitivity": str(cost),
                "at most": 1.0,
                "": verdict(cost.median, at_most=1.0),
            }
        ]
        tables["Persistent bytes"] = [
            {"method": name, "bytes per trained weight": f"{value:.1f}"}
            for name, value in used.items()
        ]
        raw |= {"seconds": seconds, "bytes": used}
    write_report("adaptive.ranks", args, tables, raw)


if __name__ == "__main__":
    main()
