"""Which way of tuning a prior is the default, by a rule set before the test rows were read.

The rule: of the ways that need no validation labels, the one with the lowest mean test NLL over all
checkpoints of `benchmarks.study.trainings`, none of which may be worse than the MAP by more than
0.005 nats. All ways share one K-FAC posterior over A and B. Beside them stand the MAP, temperature
scaling on 200 labels, and the best of a grid of prior precisions on the test rows themselves.

    python -m benchmarks.study.defaults --data DATA --out OUT

Checkpoints that are not trained yet are left out. What is finished is kept in ``defaults.json``
beside each checkpoint, and not computed again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arguments import prepare
from benchmarks.harness.report import write_report
from benchmarks.study.trainings import (
    EVALUATION_BATCH,
    Training,
    checkpoint_parser,
    in_order,
    load_checkpoint,
)
from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import MAP, TemperatureScaling
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation_cache import ValidationCache, scoring_of

WAYS: dict[str, dict[str, Any]] = {
    "leave-one-out": {"method": "loo"},
    "without recentring": {"method": "loo", "recentre": False},
    "evidence": {"method": "marglik"},
    "evidence, plain": {"method": "marglik", "correction": False},
}
UNIT = torch.ones(1)
GRID = torch.logspace(-2, 6, 33)
FIT_BATCH = 8
FIGURES = "defaults.json"


def figures(training: Training, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Return the test and shifted NLL of every way on one checkpoint, in nats."""
    task, model, _ = load_checkpoint(**vars(training), data=data, out=out, device=device)
    logits = LogitsModel(model, task.target_ids)
    la = KronLoraLaplace(logits, "classification")
    la.fit(task.loader("train", FIT_BATCH))
    priors, moved = {}, {}
    for name, way in WAYS.items():
        la.optimize_prior_precision(train_loader=task.loader("train", FIT_BATCH), **way)
        priors[name] = float(la.prior_precision)
        if la.state.settings.shift is not None:
            moved[name] = la.fitted.with_settings(replace(la.state.settings, prior_precision=UNIT))
    la.reset_mean()
    la.prior_precision = UNIT
    scoring = scoring_of(la.fitted, "quadrature", 0)
    groups = torch.zeros(len(la.params), dtype=torch.long)
    scaled = TemperatureScaling(logits, task.loader("val", EVALUATION_BATCH))
    found: dict[str, Any] = {"priors": priors, "temperature": scaled.temperature}
    for split in [split for split in ("test", "shifted") if split in task.splits]:
        loader = task.loader(split, EVALUATION_BATCH)
        options = (loader, groups, scoring.readout)
        kept = ValidationCache(Predictor(la.fitted), *options)
        caches = {name: ValidationCache(Predictor(each), *options) for name, each in moved.items()}

        def nll(prior: float, cache: ValidationCache = kept) -> float:
            covariance = cache.covariance(cache.mean.new_tensor([prior]))
            return float(scoring.nll(cache.mean, covariance, cache.y).double().mean())

        row = {name: nll(prior, caches.get(name, kept)) for name, prior in priors.items()}
        row["best in hindsight"] = min(nll(float(prior)) for prior in GRID)
        for name, method in {"MAP": MAP(logits), "temperature scaling": scaled}.items():
            losses = [
                -method(batch).double().log().gather(1, batch["labels"].unsqueeze(1))
                for batch in loader
            ]
            row[name] = float(torch.cat(losses).mean())
        found[split] = row
    return found


def rows_of(results: dict[str, dict[str, Any]], split: str) -> list[dict[str, str]]:
    """Return a table of the mean over seeds, with its standard error, and the mean over cells."""
    cells: dict[str, list[dict[str, float]]] = {}
    for name, found in results.items():
        if split in found:
            cells.setdefault(name.rpartition("-")[0], []).append(found[split])
    columns = ["MAP", "temperature scaling", *WAYS, "best in hindsight"]
    table = []
    for cell, found in cells.items():
        row = {"checkpoint": cell, "seeds": str(len(found))}
        for column in columns:
            values = torch.tensor([each[column] for each in found])
            row[column] = f"{values.mean():.3f}"
            if len(values) > 1:
                row[column] += f" ± {values.std() / math.sqrt(len(values)):.3f}"
        table.append(row)
    everything = [each for found in cells.values() for each in found]
    mean = {c: f"{sum(each[c] for each in everything) / len(everything):.3f}" for c in columns}
    worst = {c: f"{max(each[c] - each['MAP'] for each in everything):+.3f}" for c in columns}
    count = str(len(everything))
    table.append({"checkpoint": "mean", "seeds": count, **mean})
    table.append({"checkpoint": "most above MAP", "seeds": count, **worst})
    return table


def parse_arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--only", default="", help="checkpoints whose name starts so")
    return parser.parse_args(given)


def main() -> None:
    args = parse_arguments()
    prepare(args)
    results = {}
    for training in sorted(in_order(), key=lambda training: training.seed):
        name = training.name
        folder = args.out / "checkpoints" / name
        path = folder / FIGURES
        trained = (folder / "training.json").exists() and name.startswith(args.only)
        if not path.exists() and (args.report or not trained):
            continue
        if not path.exists():
            found = figures(training, args.data, args.out, args.device)
            path.write_text(json.dumps(found, indent=1))
        results[name] = json.loads(path.read_text())
        print(name, results[name], flush=True)
    tables = {"Test NLL": rows_of(results, "test"), "Shifted NLL": rows_of(results, "shifted")}
    write_report("study.defaults", args, tables, list(results.values()))


if __name__ == "__main__":
    main()
