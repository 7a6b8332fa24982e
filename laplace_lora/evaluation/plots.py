"""Plots of calibration: reliability diagram, confidence histogram, risk-coverage curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from laplace_lora.display.plots import BAR, GAP, LINE, new_figure
from laplace_lora.evaluation.metrics import risk_coverage
from laplace_lora.tuning.validation.calibration_error import BINS, bin_edges, bin_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from laplace_lora.evaluation.report import CalibrationReport


def plot_reports(reports: Sequence[CalibrationReport]) -> Figure:
    """Draw one row per report: reliability, confidence, risk against coverage.

    The reliability diagram shows the accuracy in each of 15 bins of confidence, its gap to the
    confidence, and the number of examples in the bin. Rows share their axes.

    Args:
        reports: At least one.

    Returns:
        A figure that opens no window; save it with ``savefig``.

    Raises:
        ValueError: If there are no reports.
        ImportError: If matplotlib is missing.
    """
    if not reports:
        raise ValueError("there are no reports to draw")
    figure = new_figure(10.5, 3.1 * len(reports) + 0.3)
    axes = figure.subplots(len(reports), 3, squeeze=False, sharex="col", sharey="col")
    tallest = 0.0
    for report, (left, middle, right) in zip(reports, axes, strict=True):
        _reliability(left, report)
        tallest = max(tallest, _histogram(middle, report))
        _risk(right, report)
    axes[-1][1].set_ylim(0, 1.35 * tallest)  # of all: rows share it; room for the legend
    axes[-1][-1].set_ylim(bottom=0)  # now: limits that are set no longer follow what is drawn
    for axis, label in zip(axes[-1], ("confidence", "confidence", "coverage"), strict=True):
        axis.set_xlabel(label)
    return figure


def _reliability(axis: Axes, report: CalibrationReport) -> None:
    probs, labels = report.pooled
    confidence, predicted = probs.max(-1)
    correct = (predicted == labels).double()
    index = bin_of(confidence)
    count = index.bincount(minlength=BINS)
    used = count > 0
    sums = (index.bincount(values.double(), BINS)[used] for values in (correct, confidence))
    accuracy, mean_confidence = ((values / count[used]).tolist() for values in sums)
    centres = [(i + 0.5) / BINS for i in used.nonzero().flatten().tolist()]
    width = 0.92 / BINS
    axis.bar(centres, accuracy, width, color=BAR, label="accuracy")
    heights = [c - a for a, c in zip(accuracy, mean_confidence, strict=True)]
    axis.bar(
        centres,
        heights,
        width,
        bottom=accuracy,
        color="none",
        edgecolor=GAP,
        hatch="////",
        label="gap to confidence",
    )
    axis.plot([0, 1], [0, 1], color=LINE, linewidth=1, linestyle="--")
    for x, a, c, n in zip(centres, accuracy, mean_confidence, count[used].tolist(), strict=True):
        axis.annotate(
            f"{n}",
            (x, max(a, c)),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=6.5,
        )
    ticks = [i / 5 for i in range(6)]
    axis.set(xlim=(0, 1), ylim=(0, 1.35), yticks=ticks, ylabel="accuracy")  # room for the legend
    _title(axis, report, "ECE")
    axis.legend(fontsize=7, loc="upper left", framealpha=0.9)


def _histogram(axis: Axes, report: CalibrationReport) -> float:
    """Draw how confidences are spread; return the height of the tallest bar."""
    confidence = report.pooled[0].max(-1).values.clamp(0, 1)
    counts, _, _ = axis.hist(confidence.tolist(), bin_edges().tolist(), color=BAR, rwidth=0.92)
    mean = confidence.mean().item()
    axis.axvline(mean, color=GAP, linewidth=1.5, label=f"mean confidence {mean:.3f}")
    accuracy = report["accuracy"]
    axis.axvline(
        accuracy, color=LINE, linewidth=1.5, linestyle="--", label=f"accuracy {accuracy:.3f}"
    )
    axis.set(xlim=(0, 1), ylabel="examples")
    _title(axis, report, "NLL")
    axis.legend(fontsize=7, loc="upper left", framealpha=0.9)
    return float(max(counts))


def _risk(axis: Axes, report: CalibrationReport) -> None:
    coverage, risk = risk_coverage(*report.pooled)
    axis.plot(coverage.tolist(), risk.tolist(), color=BAR, linewidth=1.5)
    axis.axhline(
        1 - report["accuracy"],
        color=LINE,
        linewidth=1,
        linestyle="--",
        label="risk at full coverage",
    )
    axis.set(xlim=(0, 1), ylabel="error rate among those accepted")
    _title(axis, report, "AURC")
    axis.legend(fontsize=7, loc="best", framealpha=0.9)


def _title(axis: Axes, report: CalibrationReport, metric: str) -> None:
    title = f"{report.name}: {metric} {report[metric]:.3f}"
    axis.set_title(title, fontsize=min(10, 360 / len(title)))  # about as wide as the axis
