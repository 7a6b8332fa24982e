"""The calibration study: Laplace posteriors and what else one would use, on real data.

A pretrained model is fine-tuned with LoRA on each task from several seeds, and every method is
judged on the same checkpoints: MAP, temperature scaling, Monte-Carlo dropout, an ensemble of all
seeds' adapters, and Laplace posteriors over the last layer, diagonal and K-FAC, tuned by marginal
likelihood without validation data; K-FAC also calibrated on the validation set. The split of the
data is the same for every seed; the test set is used for nothing but the table.

    python benchmarks/study.py --data DATA --autocast
    python benchmarks/study.py --data DATA --tasks arc_easy --model path/to/decoder

``DATA`` holds a folder a task with ``.jsonl`` files. Checkpoints and finished cells are kept under
``--out`` and never computed again; ``--full`` takes all rows there are. Seconds are this process's
own on the CPU, with one thread unless ``--threads`` says otherwise; "fit, epochs" divides those of
fitting and tuning by one pass of training in float32.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measure import prepare, write_report
from safetensors.torch import load_file, save_file
from study_checkpoints import add_training_arguments, epoch_seconds
from study_methods import ENSEMBLE, Outcome, ensemble, judged_splits, outcomes
from study_tasks import CLASSIFICATION, Task, add_task_arguments, load_task

from laplace_lora.evaluation import CalibrationReport, evaluate, plot_reports

SHOWN = ("accuracy", "NLL", "ECE", "Brier", "AURC")
DRAWN = ("MAP", "temperature scaling", "K-FAC, marginal likelihood", "K-FAC, calibrated")
EVERYTHING = 10**9


def judged(task: Task, method: str, probs: dict[str, torch.Tensor], bootstrap: int) -> dict:
    """Return the reports of a method on the test split and, where there is one, the shifted."""
    labels = {split: torch.tensor([row["labels"] for row in task.splits[split]]) for split in probs}

    def batch(split: str) -> list[dict[str, torch.Tensor]]:
        return [{"probs": probs[split], "labels": labels[split]}]

    foreign = next((s for s in ("foreign", "shifted") if s in probs), None)
    reports: dict[str, CalibrationReport] = {}
    for split in ("test", "shifted"):
        if split in probs:
            reports[split] = evaluate(
                lambda b: b["probs"],
                batch(split),
                name=method,
                ood_loader=batch(foreign) if foreign and split == "test" else None,
                bootstrap=bootstrap,
            )
    return reports


def run_cells(task: Task, args: argparse.Namespace, seed: int) -> None:
    """Compute every method of a checkpoint that is not there yet."""
    folder = args.out / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    known = {json.loads(p.read_text())["method"] for p in folder.glob(f"{task.name}-{seed}-*.json")}
    for method, outcome in outcomes(task, args, seed, known):
        if method not in known:
            keep(task, args, str(seed), method, outcome, bootstrap=2)
            print(f"{task.name}, seed {seed}: {method}", flush=True)


def keep(
    task: Task, args: argparse.Namespace, seed: str, method: str, outcome: Outcome, bootstrap: int
) -> None:
    """Write a finished cell: probabilities, then the figures."""
    reports = judged(task, method, outcome.probs, bootstrap)
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
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((args.out / "cells").glob(f"{task}-*.json")):
        cell = json.loads(path.read_text())
        if cell["seed"] == "all" or int(cell["seed"]) in args.seeds:
            found.setdefault(cell["method"], []).append(cell)
    return found


def rows_of(task: Task, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a task's table: mean and standard error over the seeds."""
    epoch = epoch_seconds(task, args)
    rows = []
    for method, cells in sorted(cells_of(args, task.name).items(), key=_place):
        row: dict[str, Any] = {"method": method, "seeds": len(cells)}
        for metric in SHOWN:
            row[metric] = _spread(cells, "test", metric)
        if "shifted" in judged_splits(task):
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
    """Sort methods from the plain to the involved."""
    kinds = ("MAP", "temp", "MC", ENSEMBLE, "last", "diag", "K-FAC, marg", "K-FAC, one", "K-FAC")
    return next(i for i, kind in enumerate(kinds) if item[0].startswith(kind)), item[0]


def _values(cells: Sequence[dict[str, Any]], split: str, metric: str) -> list[float]:
    return [cell["values"][split][metric] for cell in cells]


def _spread(cells: Sequence[dict[str, Any]], split: str, metric: str) -> str:
    values = _values(cells, split, metric)
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
    else:
        error = cells[0]["errors"][split][metric]
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def _mean(cells: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.fmean(cell[key] for cell in cells)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_task_arguments(parser, list(CLASSIFICATION))
    add_training_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--dropout-samples", type=int, default=10, help="passes of MC dropout")
    parser.add_argument("--full", action="store_true", help="all rows there are")
    parser.add_argument("--report", action="store_true", help="only write what is finished")
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "study", help="folder"
    )
    args = parser.parse_args()
    if args.full:
        args.train_size = args.test_size = args.shifted_size = EVERYTHING
    args.repeats, args.seed = 1, 0
    return args


def main() -> None:
    args = parse_arguments()
    prepare(args)
    tasks = [load_task(args, name) for name in args.tasks]
    if not args.report:
        for seed in args.seeds:
            for task in tasks:
                run_cells(task, args, seed)
        for task in tasks:
            if len(args.seeds) > 1 and ENSEMBLE not in cells_of(args, task.name):
                keep(task, args, "all", ENSEMBLE, ensemble(task, args), bootstrap=200)
    tables = {task.name: rows_of(task, args) for task in tasks if cells_of(args, task.name)}
    for task in tasks:
        draw(task, args)
    raw = {task.name: cells_of(args, task.name) for task in tasks}
    write_report("study", args, tables, raw)


if __name__ == "__main__":
    main()
