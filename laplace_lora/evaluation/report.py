"""`CalibrationReport`: a predictive's scores with standard errors, and tables of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from laplace_lora.display.results import Columns, Result
from laplace_lora.display.tables import data_frame, in_markdown, with_error
from laplace_lora.evaluation.conformal import LABEL_COVERAGE, SET_SIZE
from laplace_lora.evaluation.label_metrics import average_precisions, calibration_errors
from laplace_lora.evaluation.plots import plot_reports
from laplace_lora.evaluation.risk_control import ANSWERED, ERROR_RATE
from laplace_lora.likelihoods.multilabel import MISSING, pooled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


HIGHER = ("accuracy", "mAP", "OOD AUROC", ANSWERED)  # is better, of names that begin so
OF_PREDICTIONS = ("mAP", "per-label ECE", "accuracy", "NLL", "ECE", "Brier", "AURC")
SHOWN = (*OF_PREDICTIONS, SET_SIZE, LABEL_COVERAGE, ANSWERED, ERROR_RATE)
AS_ASKED = (LABEL_COVERAGE, ERROR_RATE)


@dataclass(frozen=True)
class CalibrationReport(Result):
    """Probabilities and labels of a test set, with their scores.

    Attributes:
        name: Name of the method.
        probs: Class probabilities, ``(examples, classes)``; of independent labels that each
            applies, ``(examples, labels)``.
        labels: Labels, ``(examples,)``; of independent ones ``(examples, labels)``, −100 where one
            is missing.
        values: Every metric by name: NLL in nats per example or known label, the others are
            fractions. NaN of independent labels where none is known, as in a group.
        errors: Their standard errors, by bootstrap over the examples; NaN where a single one
            counts, of which there is none.
        uncertainty: Predictive entropy of each example in nats, ``(examples,)``; of independent
            labels summed over them.
        mutual_information: Its epistemic part, where the method provides it; of independent labels
            that of each, ``(examples, labels)``.
        ood_uncertainty: Predictive entropy of the out-of-distribution examples, if there are any.
        sets: Which classes the conformal set of each example holds, ``(examples, classes)``.
        threshold: Confidence above which to answer, where a risk is given; 1 answers nothing.
        by_group: A report for each group of examples, where groups are given.
    """

    name: str
    probs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    values: dict[str, float]
    errors: dict[str, float]
    uncertainty: Tensor = field(repr=False)
    mutual_information: Tensor | None = field(default=None, repr=False)
    ood_uncertainty: Tensor | None = field(default=None, repr=False)
    sets: Tensor | None = field(default=None, repr=False)
    threshold: float | None = None
    by_group: Mapping[Any, CalibrationReport] = field(default_factory=dict, repr=False)

    def __getitem__(self, metric: str) -> float:
        """Return a metric's value."""
        return self.values[metric]

    @property
    def pooled(self) -> tuple[Tensor, Tensor]:
        """Class probabilities and labels, independent labels as examples of their own."""
        return pooled(self.probs, self.labels)

    @property
    def by_label(self) -> dict[str, list[float]]:
        """Of independent labels: how many of each are known and apply, and metrics of each.

        Raises:
            ValueError: If the labels are classes.
        """
        if self.labels.ndim == 1:
            raise ValueError("the labels are classes that exclude each other; see `values`")
        is_known = self.labels != MISSING
        return {
            "known": is_known.sum(0).tolist(),
            "apply": (self.labels == 1).sum(0).tolist(),
            "average precision": average_precisions(self.probs, self.labels).tolist(),
            "ECE": calibration_errors(self.probs, self.labels).tolist(),
        }

    def __str__(self) -> str:
        """Return one line: the main metrics with standard errors."""
        shown = [m for m in (*SHOWN, "OOD AUROC") if m in self.values]
        cells = [f"{m} {with_error(self.values[m], self.errors[m])}" for m in shown]
        return f"{self.name}: " + ", ".join(cells)

    def to_dict(self) -> dict[str, Any]:
        """Return name, number of examples, and the metrics with their standard errors."""
        found = {
            "name": self.name,
            "examples": len(self.labels),
            "values": dict(self.values),
            "errors": dict(self.errors),
        }
        if self.threshold is not None:
            found["threshold"] = self.threshold
        if self.by_group:
            names = [str(group) for group in self.by_group]
            if len(set(names)) < len(names):  # such as 1 and "1"
                names = [repr(group) for group in self.by_group]
            reports = [report.to_dict() for report in self.by_group.values()]
            found["by_group"] = dict(zip(names, reports, strict=True))
        return found

    def to_pandas(self) -> DataFrame:
        """Return the metrics as a data frame: one row each, with value and standard error.

        Raises:
            ImportError: If pandas is missing.
        """
        return data_frame(self._columns(), index=list(self.values))

    def _table(self) -> tuple[Columns, str, None]:
        columns = {"metric": list(self.values), **self._columns()}
        return columns, f"{self.name}, {len(self.labels)} examples", None

    def _columns(self) -> Columns:
        errors = [self.errors[metric] for metric in self.values]
        return {"value": list(self.values.values()), "standard error": errors}

    def plot(self) -> Figure:
        """Draw reliability diagram, confidence histogram and risk-coverage curve.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return plot_reports([self])


def compare(reports: Sequence[CalibrationReport], metrics: Sequence[str] | None = None) -> str:
    """Return a Markdown table: one row per report, standard errors, the best values bold.

    Args:
        reports: At least one.
        metrics: Metrics to show, by name; the main ones when ``None``.

    Raises:
        ValueError: If there are no reports, or a metric is in none of them.
    """
    if not reports:
        raise ValueError("there are no reports to compare")
    known = list(dict.fromkeys(m for report in reports for m in report.values))
    columns = list(metrics or [m for m in (*SHOWN, "OOD AUROC", "OOD FPR95") if m in known])
    for unknown in set(columns) - set(known):
        raise ValueError(f"no report has the metric {unknown!r}; there are {known}")
    better = [
        "as asked" if m in AS_ASKED else "higher" if m.startswith(HIGHER) else "lower"
        for m in columns
    ]
    table = [["method", *columns]]
    table += [[in_markdown(r.name), *(_cell(r, reports, m) for m in columns)] for r in reports]
    table.append(["*better is*", *better])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = ([f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)] for row in table)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(report: CalibrationReport, reports: Sequence[CalibrationReport], metric: str) -> str:
    if metric not in report.values:
        return "-"
    text = f"{report.values[metric]:.3f}"
    if math.isnan(report.values[metric]):
        return text
    bold = text
    all_values = [other.values.get(metric, math.nan) for other in reports]
    known = [value for value in all_values if not math.isnan(value)]
    best = max(known) if metric.startswith(HIGHER) else min(known)
    if len(reports) > 1 and text == f"{best:.3f}" and metric not in AS_ASKED:
        bold = f"**{text}**"
    return with_error(report.values[metric], report.errors[metric]).replace(text, bold, 1)
