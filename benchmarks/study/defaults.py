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

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.arguments import prepare
from benchmarks.harness.report import mean_and_error, write_report
from benchmarks.study.judging import (
    FIT_BATCH,
    Judge,
    fitted,
    judged_splits,
    nll_of,
    nll_tables,
    over_checkpoints,
)
from benchmarks.study.trainings import EVALUATION_BATCH, Training, checkpoint_parser
from laplace_lora.evaluation import MAP, TemperatureScaling

WAYS: dict[str, dict[str, Any]] = {
    "leave-one-out": {"method": "loo"},
    "without recentring": {"method": "loo", "recentre": False},
    "evidence": {"method": "marglik"},
    "evidence, plain": {"method": "marglik", "correction": False},
}
GRID = torch.logspace(-2, 6, 33)
FIGURES = "defaults.json"


def figures(training: Training, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Return the test and shifted NLL of every way on one checkpoint, in nats."""
    task, logits, la = fitted(training, data, out, device)
    ways = {}
    for name, way in WAYS.items():
        la.optimize_prior_precision(train_loader=task.loader("train", FIT_BATCH), **way)
        ways[name] = la.state.settings
    shifts = [settings.shift for settings in ways.values() if settings.shift is not None]
    still = replace(la.state.settings, shift=None)
    scaled = TemperatureScaling(logits, task.loader("val", EVALUATION_BATCH))
    priors = {name: float(settings.prior_precision) for name, settings in ways.items()}
    found: dict[str, Any] = {"priors": priors, "temperature": scaled.temperature}
    for split, loader in judged_splits(task).items():
        judge = Judge(la.fitted, loader, shifts[0] if shifts else None)
        row = {name: judge.nll(settings) for name, settings in ways.items()}
        grid = [replace(still, prior_precision=delta.reshape(1)) for delta in GRID]
        row["best in hindsight"] = min(map(judge.nll, grid))
        row |= {"MAP": nll_of(MAP(logits), loader), "temperature scaling": nll_of(scaled, loader)}
        found[split] = row
    return found


def rows_of(cells: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """Return a table of the mean over seeds, with its standard error, and the mean over cells."""
    columns = ["MAP", "temperature scaling", *WAYS, "best in hindsight"]
    table = []
    for cell, found in cells.items():
        row = {"checkpoint": cell, "seeds": str(len(found))}
        row |= {column: mean_and_error([each[column] for each in found]) for column in columns}
        table.append(row)
    everything = [each for found in cells.values() for each in found]
    mean = {c: f"{sum(each[c] for each in everything) / len(everything):.3f}" for c in columns}
    worst = {c: f"{max(each[c] - each['MAP'] for each in everything):+.3f}" for c in columns}
    count = str(len(everything))
    table.append({"checkpoint": "mean", "seeds": count, **mean})
    table.append({"checkpoint": "most above MAP", "seeds": count, **worst})
    return table


def main() -> None:
    args = checkpoint_parser(__doc__).parse_args()
    prepare(args)
    results = over_checkpoints(args, figures, FIGURES)
    write_report("study.defaults", args, nll_tables(results, rows_of), results)


if __name__ == "__main__":
    main()
