"""The study's finished cells, one per task, checkpoint and method: evaluated, saved, summarised."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness.report import mean_and_error
from benchmarks.study.checkpoints import epoch_seconds
from benchmarks.study.methods import ENSEMBLE, Outcome, evaluated_splits, outcomes
from benchmarks.study.tasks import Task
from laplace_lora.evaluation import CalibrationReport, evaluate, plot_reports

SHOWN = ("accuracy", "NLL", "ECE", "Brier", "AURC")
DRAWN = ("MAP", "temperature scaling", "K-FAC, marginal likelihood", "K-FAC, calibrated")


def reports_on(
    task: Task, method: str, probs: dict[str, torch.Tensor], bootstrap: int
) -> dict[str, CalibrationReport]:
    """Return the reports of a method on the test split and, where there is one, the shifted."""

    def batches(split: str) -> list[dict[str, torch.Tensor]]:
        labels = torch.tensor([row["labels"] for row in task.splits[split]])
        return [{"probs": probs[split], "labels": labels}]

    ood = next((split for split in ("ood", "shifted") if split in probs), None)
    return {
        split: evaluate(
            lambda batch: batch["probs"],
            batches(split),
            name=method,
            ood_loader=batches(ood) if ood and split == "test" else None,
            bootstrap=bootstrap,
        )
        for split in ("test", "shifted")
        if split in probs
    }


def run_cells(task: Task, args: argparse.Namespace, seed: int) -> None:
    """Compute every method of a checkpoint that is not there yet."""
    folder = args.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    known = {json.loads(p.read_text())["method"] for p in folder.glob(f"{task.name}-{seed}-*.json")}
    for method, outcome in outcomes(task, args, seed, known):
        if method not in known:
            save_cell(task, args, str(seed), method, outcome, bootstrap=2)
            print(f"{task.name}, seed {seed}: {method}", flush=True)


def save_cell(
    task: Task, args: argparse.Namespace, seed: str, method: str, outcome: Outcome, bootstrap: int
) -> None:
    """Write a finished cell: probabilities, then the figures."""
    reports = reports_on(task, method, outcome.probs, bootstrap)
    stem = args.out / "cells" / f"{task.name}-{seed}-{method.replace(' ', '_').replace(',', '')}"
    save_file({k: p.contiguous() for k, p in outcome.probs.items()}, f"{stem}.safetensors")
    cell = {
        "task": task.name,
        "seed": seed,
        "method": method,
        "values": {split: report.values for split, report in reports.items()},
        "errors": {split: report.errors for split, report in reports.items()},
        "fit seconds": outcome.fit,
        "predict seconds": outcome.predict,
        "bytes": outcome.memory,
        "notes": outcome.notes,
    }
    Path(f"{stem}.json").write_text(json.dumps(cell, indent=1))


def cells_of(args: argparse.Namespace, task: str) -> dict[str, list[dict[str, Any]]]:
    """Return the finished cells of a task by method, those of the seeds asked for."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((args.out / "cells").glob(f"{task}-*.json")):
        cell = json.loads(path.read_text())
        if cell["task"] == task and (cell["seed"] == "all" or int(cell["seed"]) in args.seeds):
            cells.setdefault(cell["method"], []).append(cell)
    return cells


def rows_of(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a task's table: mean and standard error over the seeds."""
    epoch = epoch_seconds(task, args)
    rows = []
    for method, cells in sorted(cells_of(args, task.name).items(), key=_place):
        row: dict[str, Any] = {"method": method, "seeds": len(cells)}
        for metric in SHOWN:
            row[metric] = _spread(cells, "test", metric)
        if "shifted" in evaluated_splits(task):
            row |= {f"shifted {m}": _spread(cells, "shifted", m) for m in ("NLL", "ECE")}
        if "OOD AUROC" in cells[0]["values"]["test"]:
            row["OOD AUROC"] = _spread(cells, "test", "OOD AUROC")
        row["fit, epochs"] = f"{_mean(cells, 'fit seconds') / epoch:.2f}"
        per_thousand = 1000 / len(task.splits["test"])
        row["predict, s per 1000"] = f"{_mean(cells, 'predict seconds') * per_thousand:.1f}"
        row["MiB"] = f"{_mean(cells, 'bytes') / 2**20:.1f}"
        rows.append(row)
    return rows


def draw(task: Task, args: argparse.Namespace) -> None:
    """Draw the reliability of the main methods, the test predictions of all seeds pooled."""
    reports = []
    labels = torch.tensor([row["labels"] for row in task.splits["test"]])
    for method in DRAWN:
        name = method.replace(" ", "_").replace(",", "")
        paths = [args.out / "cells" / f"{task.name}-{s}-{name}.safetensors" for s in args.seeds]
        probs = [load_file(path)["test"] for path in paths if path.exists()]
        if probs:
            batch = {"probs": torch.cat(probs), "labels": labels.repeat(len(probs))}
            reports.append(evaluate(lambda b: b["probs"], [batch], name=method, bootstrap=2))
    if reports:
        figure = plot_reports(reports)
        figure.suptitle(f"{task.name}: test predictions of {len(args.seeds)} checkpoints")
        figure.savefig(args.out / f"reliability-{task.name}.png", dpi=110)


def _place(item: tuple[str, Any]) -> tuple[int, str]:
    """Sort methods from the simple to the complex."""
    kinds = ("MAP", "temp", "MC", ENSEMBLE, "last", "diag", "K-FAC, marg", "K-FAC, one", "K-FAC")
    return next(i for i, kind in enumerate(kinds) if item[0].startswith(kind)), item[0]


def _spread(cells: list[dict[str, Any]], split: str, metric: str) -> str:
    values = [cell["values"][split][metric] for cell in cells]
    return mean_and_error(values, error=cells[0]["errors"][split][metric])


def _mean(cells: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(cell[key] for cell in cells)
