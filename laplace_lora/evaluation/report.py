"""`evaluate` and `compare`: how good a predictive's probabilities are, with standard errors.

The metrics themselves belong to `metrics`, pictures to `plots`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from laplace_lora.evaluation.metrics import METRICS, entropy, ood_auroc, ood_fpr95
from laplace_lora.predictive.data_sets import Predictions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Predict = Callable[[Any], Tensor | Predictions]

HIGHER = ("accuracy", "OOD AUROC")  # what the names of metrics begin with where more is better
SHOWN = ("accuracy", "NLL", "ECE", "Brier", "AURC")


@dataclass(frozen=True)
class CalibrationReport:
    """Probabilities and labels of a test set, and what they amount to.

    Attributes:
        name: Of the method.
        probs: Class probabilities, ``(examples, classes)``.
        labels: Labels, ``(examples,)``.
        values: Every metric by its name: NLL in nats per example, the others are fractions.
        errors: Their standard errors, by bootstrap over the examples.
        uncertainty: Predictive entropy of each example in nats, ``(examples,)``.
        mutual_information: Its epistemic part, where the method tells it.
        ood_uncertainty: Predictive entropy of the foreign examples, if there were any.
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
        """Return a table row: the main metrics with standard errors."""
        shown = [m for m in (*SHOWN, "OOD AUROC") if m in self.values]
        cells = [f"{m} {self.values[m]:.3f} ± {self.errors[m]:.3f}" for m in shown]
        return f"{self.name}: " + ", ".join(cells)

    def plot(self) -> Figure:
        """Draw reliability diagram, confidence histogram and risk-coverage curve.

        Raises:
            ImportError: If matplotlib is missing.
        """
        from laplace_lora.evaluation.plots import plot_reports

        return plot_reports([self])


def evaluate(
    predict: Predict,
    loader: Any,
    *,
    name: str = "predictive",
    ood_loader: Any = None,
    label_key: str = "labels",
    bootstrap: int = 200,
    seed: int = 0,
    progress_bar: bool = False,
) -> CalibrationReport:
    """Judge a predictive on labelled data, and on foreign data if there are any.

    Args:
        predict: From a batch to class probabilities ``(batch, classes)``, or to `Predictions`:
            a posterior ``la``, ``la.predict``, a baseline of this package, or any function.
        loader: Batches with labels: mappings with ``label_key``, or pairs of inputs and labels.
        name: Of the method, for tables and pictures.
        ood_loader: Batches of foreign inputs, whose labels are ignored; adds ``"OOD AUROC"`` and
            ``"OOD FPR95"`` by predictive entropy, and ``"OOD AUROC (MI)"`` by mutual information
            where ``predict`` tells it.
        label_key: Key of the labels.
        bootstrap: Resamples behind the standard errors.
        seed: Of the resamples.
        progress_bar: Show progress over the batches.

    Returns:
        The report; tensors are on the CPU.

    Raises:
        ValueError: If the loader is empty, a batch has no labels, labels lie outside the classes,
            ``predict`` does not return probabilities, or ``bootstrap`` is below 2.
    """
    if bootstrap < 2:
        raise ValueError(f"bootstrap needs two resamples or more, got {bootstrap}")
    hidden = not progress_bar
    own = [
        (*_probabilities(predict, batch), _labels(batch, label_key))
        for batch in tqdm(loader, disable=hidden, desc=f"Evaluating {name}")
    ]
    if not own:
        raise ValueError("the loader is empty")
    p, mi, y = (_joined(column) for column in zip(*own, strict=True))
    assert p is not None and y is not None
    if int(y.min()) < 0 or int(y.max()) >= p.shape[1]:
        raise ValueError(f"labels must lie in 0..{p.shape[1] - 1}, got {y.min()} to {y.max()}")
    values = {metric: function(p, y) for metric, function in METRICS.items()}
    generator = torch.Generator().manual_seed(seed)

    def resampled(n: int) -> Tensor:
        return torch.randint(n, (bootstrap, n), generator=generator)

    draws = [{m: f(p[i], y[i]) for m, f in METRICS.items()} for i in resampled(len(y))]
    outside = None
    if ood_loader is not None:
        foreign = [
            _probabilities(predict, batch)
            for batch in tqdm(ood_loader, disable=hidden, desc=f"Evaluating {name}, foreign data")
        ]
        if not foreign:
            raise ValueError("the loader of foreign data is empty")
        q, q_mi = (_joined(column) for column in zip(*foreign, strict=True))
        assert q is not None
        outside = entropy(q)
        scores: dict[str, tuple[Tensor, Tensor]] = {"": (entropy(p), outside)}
        if mi is not None and q_mi is not None:
            scores[" (MI)"] = (mi, q_mi)
        values |= _detection(scores)
        for draw, i, j in zip(draws, resampled(len(y)), resampled(len(q)), strict=True):
            draw |= _detection({kind: (a[i], b[j]) for kind, (a, b) in scores.items()})
    errors = {m: torch.tensor([draw[m] for draw in draws]).std().item() for m in values}
    return CalibrationReport(name, p, y, values, errors, entropy(p), mi, outside)


def compare(reports: Sequence[CalibrationReport], metrics: Sequence[str] | None = None) -> str:
    """Return a Markdown table, a row a report, with standard errors; the best values are bold.

    Args:
        reports: At least one.
        metrics: Names of the columns; the main ones when ``None``.

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
    found = {f"OOD AUROC{kind}": ood_auroc(*pair) for kind, pair in scores.items()}
    return found | {f"OOD FPR95{kind}": ood_fpr95(*pair) for kind, pair in scores.items()}


def _probabilities(predict: Predict, batch: Any) -> tuple[Tensor, Tensor | None]:
    x = batch if isinstance(batch, Mapping | Tensor) else batch[0]
    with torch.no_grad():
        found = predict(x)
    p, mi = (
        (found.probs, found.mutual_information) if isinstance(found, Predictions) else (found, None)
    )
    if not isinstance(p, Tensor) or p.ndim != 2 or p.shape[1] < 2:
        raise ValueError("predict must return class probabilities, (batch, classes)")
    p = p.detach().cpu().float()
    if bool((p < 0).any()) or not torch.allclose(p.sum(-1), torch.ones(len(p)), atol=1e-2):
        raise ValueError(
            "predict must return probabilities that sum to 1; apply a softmax to logits"
        )
    return p, None if mi is None else mi.detach().cpu()


def _labels(batch: Any, label_key: str) -> Tensor:
    if isinstance(batch, Mapping) and label_key in batch:
        return torch.as_tensor(batch[label_key]).cpu()
    if isinstance(batch, Sequence) and len(batch) == 2:
        return torch.as_tensor(batch[1]).cpu()
    raise ValueError(f"a batch has no {label_key!r}; name its labels with `label_key`")


def _joined(column: Sequence[Tensor | None]) -> Tensor | None:
    present = [value for value in column if value is not None]
    return torch.cat(present) if len(present) == len(column) else None
