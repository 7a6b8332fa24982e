"""`evaluate` and `compare`: scores of a predictive's probabilities, with standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from laplace_lora.data.batches import Batch, batch_labels
from laplace_lora.data.distributed import together
from laplace_lora.display.tables import data_frame, html_table
from laplace_lora.evaluation.label_metrics import (
    LABEL_METRICS,
    average_precisions,
    calibration_errors,
    label_entropy,
)
from laplace_lora.evaluation.metrics import METRICS, entropy, ood_auroc, ood_fpr95
from laplace_lora.evaluation.plots import plot_reports
from laplace_lora.evaluation.rows import Predict, predicted_rows
from laplace_lora.evaluation.token_rows import resamples
from laplace_lora.likelihoods.multilabel import MISSING, known_labels, pooled

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


HIGHER = ("accuracy", "mAP", "OOD AUROC")  # prefixes of the metrics for which higher is better
SHOWN = ("mAP", "per-label ECE", "accuracy", "NLL", "ECE", "Brier", "AURC")


@dataclass(frozen=True)
class CalibrationReport:
    """Probabilities and labels of a test set, with their scores.

    Attributes:
        name: Name of the method.
        probs: Class probabilities, ``(examples, classes)``; of independent labels that each
            applies, ``(examples, labels)``.
        labels: Labels, ``(examples,)``; of independent ones ``(examples, labels)``, −100 where one
            is missing.
        values: Every metric by name: NLL in nats per example or known label, the others are
            fractions.
        errors: Their standard errors, by bootstrap over the examples.
        uncertainty: Predictive entropy of each example in nats, ``(examples,)``; of independent
            labels summed over them.
        mutual_information: Its epistemic part, where the method provides it; of independent labels
            that of each, ``(examples, labels)``.
        ood_uncertainty: Predictive entropy of the out-of-distribution examples, if there are any.
    """

    name: str
    probs: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    values: dict[str, float]
    errors: dict[str, float]
    uncertainty: Tensor = field(repr=False)
    mutual_information: Tensor | None = field(default=None, repr=False)
    ood_uncertainty: Tensor | None = field(default=None, repr=False)

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
        cells = [f"{m} {self.values[m]:.3f} ± {self.errors[m]:.3f}" for m in shown]
        return f"{self.name}: " + ", ".join(cells)

    def _repr_html_(self) -> str:
        """Return a table of the metrics, as notebooks show it."""
        columns: dict[str, list[Any]] = {"metric": list(self.values), **self._columns()}
        return html_table(columns, f"{self.name}, {len(self.labels)} examples")

    def to_dict(self) -> dict[str, Any]:
        """Return name, number of examples, and the metrics with their standard errors."""
        return {
            "name": self.name,
            "examples": len(self.labels),
            "values": dict(self.values),
            "errors": dict(self.errors),
        }

    def to_pandas(self) -> DataFrame:
        """Return the metrics as a data frame: one row each, with value and standard error.

        Raises:
            ImportError: If pandas is missing.
        """
        return data_frame(self._columns(), index=list(self.values))

    def _columns(self) -> dict[str, list[float]]:
        errors = [self.errors[metric] for metric in self.values]
        return {"value": list(self.values.values()), "standard error": errors}

    def plot(self) -> Figure:
        """Draw reliability diagram, confidence histogram and risk-coverage curve.

        Raises:
            ImportError: If matplotlib is missing.
        """
        return plot_reports([self])


def evaluate(
    predict: Predict,
    loader: Iterable[Batch],
    *,
    name: str = "predictive",
    ood_loader: Iterable[Batch] | None = None,
    label_key: str = "labels",
    bootstrap: int = 200,
    seed: int = 0,
    progress_bar: bool = False,
) -> CalibrationReport:
    """Evaluate a predictive on labelled data, and on out-of-distribution data if given.

    Labels ``(batch, labels)`` that do not exclude each other are scored by `label_metrics`.

    Args:
        predict: From a batch to class probabilities ``(batch, classes)``, or to `Predictions`:
            a posterior ``la``, ``la.predict``, a baseline of this package, or any function. With
            labels ``(batch, labels)``, to the probabilities that they apply. Of a token classifier
            ``(batch, tokens, classes)``, zeros at padding: then every labelled token counts, and
            standard errors are by bootstrap over the texts.
        loader: Batches with labels: mappings with ``label_key``, or pairs of inputs and labels.
        name: Name of the method, for tables and plots.
        ood_loader: Batches of out-of-distribution inputs, whose labels are ignored; adds
            ``"OOD AUROC"`` and ``"OOD FPR95"`` by predictive entropy, and ``"OOD AUROC (MI)"`` and
            ``"OOD FPR95 (MI)"`` by mutual information where ``predict`` provides it.
        label_key: Key of the labels.
        bootstrap: Number of resamples behind the standard errors.
        seed: Seed of the resamples.
        progress_bar: Show progress over the batches.

    Returns:
        The report; tensors are on the CPU.

    Raises:
        ValueError: If a loader is empty, a batch has no labels, labels lie outside the classes or
            none is known, ``predict`` does not return probabilities, or ``bootstrap`` is below 2.
    """
    if bootstrap < 2:
        raise ValueError(f"bootstrap needs two resamples or more, got {bootstrap}")
    with together(loader, ood_loader) as team:
        batches = team.batches(loader, f"Evaluating {name}", progress_bar)
        scored = predicted_rows(
            team, predict, batches, lambda batch: batch_labels(batch, label_key).cpu()
        )
        if not scored:
            raise ValueError("the loader is empty")
        p, y, information = scored["p"], scored["labels"], scored.get("information")
        if ood_loader is not None:
            title = f"Evaluating {name}, out of distribution"
            batches = team.batches(ood_loader, title, progress_bar)
            outside = predicted_rows(team, predict, batches, None, y.ndim == 2)
            if not outside:
                raise ValueError("the out-of-distribution loader is empty")
    metrics = METRICS if y.ndim == 1 else LABEL_METRICS
    if y.ndim == 2:
        y = known_labels(y)
        if not bool((y != MISSING).any()):
            raise ValueError("no label of the data is known: all are -100 or NaN")
    elif int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise ValueError(f"labels must lie in 0..{p.shape[1] - 1}, got {y.min()} to {y.max()}")
    values = {metric: function(p, y) for metric, function in metrics.items()}
    generator = torch.Generator().manual_seed(seed)

    def resampled(rows: Mapping[str, Tensor]) -> Iterator[Tensor]:
        return resamples(rows, bootstrap, generator)

    draws = [{m: f(p[i], y[i]) for m, f in metrics.items()} for i in resampled(scored)]
    entropy_of = entropy if y.ndim == 1 else label_entropy
    uncertainty, ood_uncertainty = entropy_of(p), None
    if ood_loader is not None:
        ood_uncertainty, ood_information = entropy_of(outside["p"]), outside.get("information")
        scores = {"": (uncertainty, ood_uncertainty)}
        if information is not None and ood_information is not None:
            scores[" (MI)"] = (_in_all(information), _in_all(ood_information))
        values |= _detection(scores)
        pairs = list(resampled(scored)), list(resampled(outside))
        for draw, i, j in zip(draws, *pairs, strict=True):
            draw |= _detection({kind: (a[i], b[j]) for kind, (a, b) in scores.items()})
    errors = {m: _spread(torch.tensor([draw[m] for draw in draws])) for m in values}
    return CalibrationReport(name, p, y, values, errors, uncertainty, information, ood_uncertainty)


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
    better = ["higher" if m.startswith(HIGHER) else "lower" for m in columns]
    table = [["method", *columns]]
    table += [[r.name, *(_cell(r, reports, m) for m in columns)] for r in reports]
    table.append(["*better is*", *better])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    table.insert(1, ["-" * width for width in widths])
    lines = ([f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)] for row in table)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(report: CalibrationReport, reports: Sequence[CalibrationReport], metric: str) -> str:
    if metric not in report.values:
        return "-"
    all_values = [other.values[metric] for other in reports if metric in other.values]
    best = max(all_values) if metric.startswith(HIGHER) else min(all_values)
    text = f"{report.values[metric]:.3f}"
    if len(reports) > 1 and text == f"{best:.3f}":
        text = f"**{text}**"
    return f"{text} ± {report.errors[metric]:.3f}"


def _in_all(information: Tensor) -> Tensor:
    """Return one number per example, of independent labels the sum."""
    return information if information.ndim == 1 else information.sum(1)


def _spread(values: Tensor) -> float:
    """Return the standard deviation of resamples; some may have no average precision."""
    return values[~values.isnan()].std().item()


def _detection(scores: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    auroc = {f"OOD AUROC{kind}": ood_auroc(*pair) for kind, pair in scores.items()}
    return auroc | {f"OOD FPR95{kind}": ood_fpr95(*pair) for kind, pair in scores.items()}
