"""Calibration on few labels: `la.calibrate` against temperature scaling with the same labels.

On every checkpoint of `benchmarks.study.trainings` the default posterior is calibrated on 50
validation rows, four times on other rows, twice on 200 and once on 500; beside it stand temperature
scaling on the same rows, and both the posterior and the MAP without any labels.

    python -m benchmarks.study.calibrating --data DATA --out OUT

What is finished is kept in ``calibrating.json`` beside each checkpoint, and not computed again.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

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

FIGURES = "calibrating.json"
DRAWS = {50: 4, 200: 2, 500: 1}  # by number of labels


def figures(training: Training, data: Path, out: Path, device: str) -> dict[str, Any]:
    """Return the test and shifted NLL on one checkpoint, in nats; the mean over draws of labels."""
    task, logits, la = fitted(training, data, out, device)
    la.optimize_prior_precision(train_loader=task.loader("train", FIT_BATCH))
    state = la.state
    tuned = state.settings
    rows = task.splits["val"]
    chosen: dict[int, list[tuple[Any, TemperatureScaling]]] = {}
    for labels, draws in DRAWS.items():
        for draw in range(draws):
            few = rows[draw * labels : (draw + 1) * labels]
            loader = DataLoader(few, EVALUATION_BATCH, collate_fn=task.collate)
            la.state = state
            la.calibrate(loader)
            scaled = TemperatureScaling(logits, loader)
            chosen.setdefault(labels, []).append((la.state.settings, scaled))
    la.state = state
    found: dict[str, Any] = {}
    for split, loader in judged_splits(task).items():
        judge = Judge(la.fitted, loader, tuned.shift)
        found[split] = {"MAP": nll_of(MAP(logits), loader), "no labels": judge.nll(tuned)}
        for labels, pairs in chosen.items():
            ours = [judge.nll(settings) for settings, _ in pairs]
            theirs = [nll_of(scaled, loader) for _, scaled in pairs]
            found[split][f"calibrate, {labels}"] = statistics.fmean(ours)
            found[split][f"temperature scaling, {labels}"] = statistics.fmean(theirs)
    return found


def rows_of(cells: dict[str, list[dict[str, float]]]) -> list[dict[str, str]]:
    """Return a table: the mean over seeds with its standard error, and paired differences."""
    table = [_row(cell, found) for cell, found in cells.items()]
    return [*table, _row("mean", [each for found in cells.values() for each in found])]


def _row(name: str, found: list[dict[str, float]]) -> dict[str, str]:
    """Return one line of the table."""
    row = {"checkpoint": name, "seeds": str(len(found))}
    for column in found[0]:
        row[column] = mean_and_error([each[column] for each in found])
    for labels in DRAWS:
        ours, theirs = f"calibrate, {labels}", f"temperature scaling, {labels}"
        differences = [each[ours] - each[theirs] for each in found]
        row[f"difference, {labels}"] = mean_and_error(differences)
    return row


def main() -> None:
    args = checkpoint_parser(__doc__).parse_args()
    prepare(args)
    results = over_checkpoints(args, figures, FIGURES)
    write_report("study.calibrating", args, nll_tables(results, rows_of), results)


if __name__ == "__main__":
    main()
