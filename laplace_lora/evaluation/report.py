"""`evaluate` and `compare`: scores of a predictive's probabilities, with standard errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from laplace_lora.data.batches import Batch, batch_labels, model_inputs
from laplace_lora.data.distributed import Together, together
from laplace_lora.display.tables import data_frame, html_table
from laplace_lora.evaluation.metrics import METRICS, entropy, ood_auroc, ood_fpr95
from laplace_lora.evaluation.plots import plot_reports

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame


@runtime_checkable
class UncertainPrediction(Protocol):
    """What is scored of `Predictions`, as ``la.predict`` returns them."""

    @property
    def probs(self) -> Tensor | None:
        """Class probabilities, ``(batch, classes)``."""
        ...

    @property
    def mutual_information(self) -> Tensor | None:
        """The epistemic part of the uncertainty in nats, ``(batch,)``."""
        ...


Predict = Callable[[Any], Tensor | UncertainPrediction]  # from a batch of any form

HIGHER = ("accuracy", "OOD AUROC")  # prefixes of the metrics for which higher is better
SHOWN = ("accuracy", "NLL", "ECE", "Brier", "AURC")


@dataclass(frozen=True)
class CalibrationReport:
    """Probabilities and labels of a test set, with their scores.

    Attributes:
        name: Name of the method.
        probs: Class probabilities, ``(examples, classes)``.
        labels: Labels, ``(examples,)``.
        values: Every metric by name: NLL in nats per example, the others are fractions.
        errors: Their standard errors, by bootstrap over the examples.
        uncertainty: Predictive entropy of each example in nats, ``(examples,)``.
        mutual_information: Its epistemic part, where the method provides it.
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

    Args:
        predict: From a batch to class probabilities ``(batch, classes)``, or to `Predictions`:
            a posterior ``la``, ``la.predict``, a baseline of this package, or any function.
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
        ValueError: If a loader is empty, a batch has no labels, labels lie outside the classes,
            ``predict`` does not return probabilities, or ``bootstrap`` is below 2.
    """
    if bootstrap < 2:
        raise ValueError(f"bootstrap needs two resamples or more, got {bootstrap}")
    with together(loader, ood_loader) as team:
        batches = team.batches(loader, f"Evaluating {name}", progress_bar)
        scored = _rows(team, predict, batches, lambda batch: batch_labels(batch, label_key).cpu())
        if not scored:
            raise ValueError("the loader is empty")
        p, y, information = scored["p"], scored["labels"], scored.get("information")
        if ood_loader is not None:
            title = f"Evaluating {name}, out of distribution"
            outside = _rows(team, predict, team.batches(ood_loader, title, progress_bar))
            if not outside:
                raise ValueError("the out-of-distribution loader is empty")
    if int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise ValueError(f"labels must lie in 0..{p.shape[1] - 1}, got {y.min()} to {y.max()}")
    values = {metric: function(p, y) for metric, function in METRICS.items()}
    generator = torch.Generator().manual_seed(seed)

    def resampled(n: int) -> Tensor:
        return torch.randint(n, (bootstrap, n), generator=generator)

    draws = [{m: f(p[i], y[i]) for m, f in METRICS.items()} for i in resampled(len(y))]
    uncertainty, ood_uncertainty = entropy(p), None
    if ood_loader is not None:
        ood_uncertainty, ood_information = entropy(outside["p"]), outside.get("information")
        scores = {"": (uncertainty, ood_uncertainty)}
        if information is not None and ood_information is not None:
            scores[" (MI)"] = (information, ood_information)
        values |= _detection(scores)
        for draw, i, j in zip(
            draws, resampled(len(y)), resampled(len(ood_uncertainty)), strict=True
        ):
            draw |= _detection({kind: (a[i], b[j]) for kind, (a, b) in scores.items()})
    errors = {m: torch.tensor([draw[m] for draw in draws]).std().item() for m in values}
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


def _detection(scores: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    auroc = {f"OOD AUROC{kind}": ood_auroc(*pair) for kind, pair in scores.items()}
    return auroc | {f"OOD FPR95{kind}": ood_fpr95(*pair) for kind, pair in scores.items()}


def _rows(
    team: Together,
    predict: Predict,
    batches: Iterable[Batch],
    labels: Callable[[Batch], Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return probabilities, labels and mutual information, where there are any, of all examples."""
    columns: dict[str, list[Tensor | None]] = {"p": [], "labels": [], "information": []}
    for batch in batches:
        p, information = _probabilities(predict, batch)
        row = (p, None if labels is None else labels(batch), information)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    present = {
        name: [value for value in column if value is not None]
        for name, column in columns.items()
        if all(value is not None for value in column)
    }
    return team.rows(**present)


def _probabilities(predict: Predict, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Return class probabilities, and mutual information where there is any."""
    with torch.no_grad():
        prediction = predict(model_inputs(batch))
    if isinstance(prediction, UncertainPrediction):
        p, information = prediction.probs, prediction.mutual_information
    else:
        p, information = prediction, None
    if not isinstance(p, Tensor) or p.ndim != 2 or p.shape[1] < 2:
        raise ValueError("predict must return class probabilities, (batch, classes)")
    p = p.detach().cpu().float()
    if bool((p < 0).any()) or not torch.allclose(p.sum(-1), torch.ones(len(p)), atol=1e-2):
        raise ValueError(
            "predict must return probabilities that sum to 1; apply a softmax to logits"
        )
    return p, None if information is None else information.detach().cpu()
