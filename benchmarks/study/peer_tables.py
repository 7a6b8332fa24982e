"""Tables of the comparison of methods: metrics, paired differences, wins and costs.

A cell is one method on one checkpoint. Every ± is the standard error over trainings; differences
are taken on the same checkpoint first. Tasks on which no training beats the majority class are
marked with a star and left out of means over cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from benchmarks.harness.report import mean_and_error
from laplace_lora.evaluation.metrics import (
    accuracy,
    accuracy_at,
    aurc,
    brier,
    debiased_ce,
    ece,
    entropy,
    nll,
    ood_auroc,
)

METRICS: dict[str, Callable[[Tensor, Tensor], float]] = {
    "NLL": nll,
    "ECE": ece,
    "debiased CE": debiased_ce,
    "Brier": brier,
    "accuracy": accuracy,
    "accuracy at 80%": accuracy_at(0.8),
    "AURC": aurc,
}
MODELS = ("encoder", "decoder")
NEAR = 5e-4  # nats; smaller differences are 0.000 in the tables, and count as none
FEWEST = 3  # trainings that a standard error is taken of


@dataclass(frozen=True)
class Cell:
    """A method on a checkpoint.

    Attributes:
        name: The checkpoint's, its seed last.
        method: The method's.
        labels: By split, ``(rows,)``.
        probs: Class probabilities by split, ``(rows, classes)``.
        cost: ``bytes`` that are stored and, where they were measured, the seconds to ``fit`` and to
            ``predict`` the test rows.
    """

    name: str
    method: str
    labels: dict[str, Tensor]
    probs: dict[str, Tensor]
    cost: dict[str, float]

    @property
    def group(self) -> str:
        """The checkpoint's name without its seed."""
        return self.name.rpartition("-")[0]

    @property
    def seed(self) -> int:
        """The checkpoint's seed."""
        return int(self.name.rpartition("-")[2])

    @cached_property
    def values(self) -> dict[str, float]:
        """Metrics of the test rows; those of shifted and foreign rows by longer names."""
        p, y = self.probs["test"], self.labels["test"]
        found = {metric: function(p, y) for metric, function in METRICS.items()}
        doubt, wrong = entropy(p), p.argmax(-1) != y
        if bool(wrong.any()) and not bool(wrong.all()):
            found["AUROC, wrong"] = ood_auroc(doubt[~wrong], doubt[wrong])
        for split in ("shifted", "ood"):
            if split in self.probs:
                found[f"AUROC, {split}"] = ood_auroc(doubt, entropy(self.probs[split]))
        if "shifted" in self.probs:
            found["shifted NLL"] = nll(self.probs["shifted"], self.labels["shifted"])
            found["shifted ECE"] = ece(self.probs["shifted"], self.labels["shifted"])
        return found

    @property
    def majority(self) -> float:
        """The accuracy of always giving the test rows' most frequent class."""
        counts = self.labels["test"].bincount()
        return float(counts.max()) / len(self.labels["test"])


def tables_of(cells: list[Cell]) -> tuple[dict[str, list[dict[str, str]]], list[dict[str, Any]]]:
    """Return all tables by heading, and the figures they are of."""
    at_chance = _at_chance(cells)
    learnt = [cell for cell in cells if cell.group not in at_chance]
    tables = {
        "Test NLL": _by_group(cells, "NLL", at_chance),
        "Shifted NLL": _by_group(cells, "shifted NLL", at_chance),
        "Test NLL minus the MAP's": _differences(cells, "NLL", at_chance),
        **{f"Means over checkpoints that have learnt, {m}": _means(learnt, m) for m in MODELS},
        "Wins: cells with a lower test NLL by more than two standard errors": _wins(cells),
        "Cost, in units of the MAP's predictions of the test rows": _costs(cells),
    }
    raw = [
        {"checkpoint": c.name, "method": c.method, "values": c.values, "cost": c.cost}
        for c in cells
    ]
    return {heading: rows for heading, rows in tables.items() if rows}, raw


def _at_chance(cells: list[Cell]) -> set[str]:
    """Return the groups on which no training's MAP beats the majority class."""
    maps = [cell for cell in cells if cell.method == "MAP"]
    beaten = {cell.group for cell in maps if cell.values["accuracy"] > cell.majority}
    return {cell.group for cell in maps} - beaten


def _methods(cells: Iterable[Cell]) -> list[str]:
    return list(dict.fromkeys(cell.method for cell in cells))


def _pick(cells: list[Cell], group: str, method: str, metric: str) -> dict[str, float]:
    """Return a metric by checkpoint."""
    return {
        cell.name: cell.values[metric]
        for cell in cells
        if cell.group == group and cell.method == method and metric in cell.values
    }


def _by_group(cells: list[Cell], metric: str, at_chance: set[str]) -> list[dict[str, str]]:
    rows = []
    for group in dict.fromkeys(cell.group for cell in cells):
        values = {m: list(_pick(cells, group, m, metric).values()) for m in _methods(cells)}
        if any(values.values()):
            row = {"checkpoints": group + "*" * (group in at_chance)}
            row["seeds"] = str(max(map(len, values.values())))
            rows.append(row | {m: mean_and_error(v) if v else "-" for m, v in values.items()})
    return rows


def _paired(cells: list[Cell], group: str, first: str, second: str, metric: str) -> list[float]:
    """Return the differences on the checkpoints that have both methods."""
    one, other = (_pick(cells, group, method, metric) for method in (first, second))
    return [one[name] - other[name] for name in one if name in other]


def _differences(cells: list[Cell], metric: str, at_chance: set[str]) -> list[dict[str, str]]:
    rows = []
    methods = [method for method in _methods(cells) if method != "MAP"]
    for group in dict.fromkeys(cell.group for cell in cells):
        row = {"checkpoints": group + "*" * (group in at_chance)}
        for method in methods:
            found = _paired(cells, group, method, "MAP", metric)
            row[method] = mean_and_error(found) if found else "-"
        rows.append(row)
    worst = {"checkpoints": "largest loss on one checkpoint"}
    for method in methods:
        found = [
            difference
            for group in {cell.group for cell in cells}
            for difference in _paired(cells, group, method, "MAP", metric)
        ]
        worst[method] = f"{max(found):+.3f}" if found else "-"
    return [*rows, worst] if rows else []


def _means(cells: list[Cell], model: str) -> list[dict[str, str]]:
    """Return the mean of every metric, over the checkpoints of a model that every method has.

    Methods that lack more than half of the checkpoints are left out.
    """
    cells = [cell for cell in cells if cell.name.startswith(model)]
    metrics = list(dict.fromkeys(metric for cell in cells for metric in cell.values))
    names = {m: {cell.name for cell in cells if cell.method == m} for m in _methods(cells)}
    most = max(map(len, names.values()), default=0)
    kept = [method for method in names if 2 * len(names[method]) > most]
    common = set.intersection(*(names[method] for method in kept)) if kept else set()
    rows = []
    for method in kept:
        mine = [cell for cell in cells if cell.method == method and cell.name in common]
        row = {"method": method, "checkpoints": str(len(mine))}
        for metric in metrics:
            values = [cell.values[metric] for cell in mine if metric in cell.values]
            row[metric] = f"{statistics.fmean(values):.3f}" if values else "-"
        rows.append(row)
    return rows


def _wins(cells: list[Cell]) -> list[dict[str, str]]:
    """Return, for each pair, on how many cells the row's method beats the column's, of how many.

    A cell counts where both have at least three trainings.
    """
    methods, rows = _methods(cells), []
    groups = {cell.group for cell in cells}
    for first in methods:
        row = {"": first}
        for second in methods:
            won = met = 0
            for group in groups:
                found = _paired(cells, group, first, second, "NLL")
                if len(found) >= FEWEST:
                    error = statistics.stdev(found) / math.sqrt(len(found))
                    met += 1
                    won += statistics.fmean(found) < -max(2 * error, NEAR)
            row[second] = "" if first == second else f"{won} of {met}"
        rows.append(row)
    return rows


def _costs(cells: list[Cell]) -> list[dict[str, str]]:
    timed = [cell for cell in cells if "predict" in cell.cost]
    bare = {cell.name: cell.cost["predict"] for cell in timed if cell.method == "MAP"}
    rows = []
    for method in _methods(timed):
        mine = [cell for cell in timed if cell.method == method and cell.name in bare]
        if not mine:
            continue
        row = {"method": method}
        for key in ("fit", "predict"):
            row[key] = f"{statistics.median(c.cost[key] / bare[c.name] for c in mine):.1f}"
        row["MiB"] = f"{statistics.fmean(c.cost['bytes'] for c in mine) / 2**20:.1f}"
        rows.append(row)
    return rows
