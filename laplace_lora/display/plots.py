"""Pictures of results, drawn on figures that open no window."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, GAP, LINE = "#4878a8", "#d1605e", "#404040"
BINS = 20
FAR = 4  # times the longest bar
TEXTS = 40  # shown of a table of texts, at most
LEAST_HEIGHT = 2.8  # inches, in which the name of a colour bar has room


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure.

    Args:
        width: In inches.
        height: In inches.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting requires matplotlib: `pip install matplotlib`") from error
    return Figure(figsize=(width, height), layout="constrained")


def uncertainty_figure(
    entropy: Tensor, mutual_information: Tensor, is_wrong: Tensor | None = None
) -> Figure:
    """Draw the two parts of every example's uncertainty, and how the epistemic one is spread.

    Args:
        entropy: Total uncertainty in nats, ``(examples,)``.
        mutual_information: Its epistemic part.
        is_wrong: Which examples are predicted wrongly, where labels are known.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = new_figure(8.4, 3.2)
    parts, spread = figure.subplots(1, 2)
    order = entropy.argsort(descending=True)
    if len(order) == 1:  # from side to side
        order = order.repeat(2)
    places = torch.linspace(0, 1, len(order)).tolist()
    epistemic = mutual_information[order].clamp(min=0)
    layers = [(entropy[order] - epistemic).clamp(min=0).tolist(), epistemic.tolist()]
    parts.stackplot(places, *layers, labels=["aleatoric", "epistemic"], colors=[BAR, GAP])
    parts.set(xlim=(0, 1), xlabel="examples, the least certain first", ylabel="entropy in nats")
    parts.legend(fontsize=8)
    groups = {"examples": mutual_information}
    if is_wrong is not None:
        groups = {
            "right": mutual_information[~is_wrong],
            "wrong": mutual_information[is_wrong],
        }
    colours = [BAR, GAP][: len(groups)]
    values = [group.tolist() for group in groups.values()]
    spread.hist(values, BINS, stacked=True, color=colours, label=list(groups))
    spread.set(xlabel="mutual information in nats", ylabel="examples")
    if len(groups) > 1:
        spread.legend(fontsize=8)
    return figure


def interval_figure(mean: Tensor, std: Tensor, targets: Tensor | None) -> Figure:
    """Draw means with two standard deviations, by rising mean, a panel for each output.

    Args:
        mean: Shape ``(examples, outputs)``.
        std: Standard deviations, likewise.
        targets: Likewise, where they are known.

    Raises:
        ImportError: If matplotlib is missing.
    """
    count = mean.shape[1]
    figure = new_figure(4.2 * count, 3.2)
    axes: Sequence[Axes] = figure.subplots(1, count, squeeze=False)[0]
    for output, axis in enumerate(axes):
        order = mean[:, output].argsort()
        centre, width = mean[order, output], 2 * std[order, output]
        places = list(range(len(order)))
        band = (centre - width).tolist(), (centre + width).tolist()
        label = "two standard deviations of the mean"  # an observation has its noise besides
        axis.fill_between(places, *band, color=BAR, alpha=0.3, label=label)
        axis.plot(places, centre.tolist(), color=BAR, label="mean")
        if targets is not None:
            shown = targets[order, output].tolist()
            axis.plot(places, shown, ".", color=GAP, markersize=4, label="target")
        axis.set(xlabel="examples, by rising mean", ylabel=f"output {output}")
    axes[0].legend(fontsize=8)
    return figure


def change_figure(panels: Sequence[tuple[str, Sequence[str], Sequence[float]]]) -> Figure:
    """Draw bars of what a number was and became, a panel for each.

    Args:
        panels: What it is; the names of the bars; their heights.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = new_figure(3.2 * len(panels), 3.0)
    axes: Sequence[Axes] = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names, heights) in zip(axes, panels, strict=True):
        colours = [LINE, *[BAR] * (len(names) - 1)]
        bars = axis.bar(list(names), list(heights), color=colours)
        axis.bar_label(bars, fmt="%.3f", fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
    return figure


def parts_figure(bars: Mapping[str, Mapping[str, float]], free: float, unit: str) -> Figure:
    """Draw lying bars made of parts, and how far they may reach, unless that is far away.

    Args:
        bars: From the name of a bar to its parts, which have the same names in each.
        free: How far that is.
        unit: Of all numbers.

    Raises:
        ImportError: If matplotlib is missing.
    """
    figure = new_figure(6.4, 0.8 + 0.6 * len(bars))
    axis = figure.subplots()
    names = list(bars)
    left = [0.0] * len(names)
    for colour, part in zip((BAR, GAP, LINE), next(iter(bars.values())), strict=False):
        widths = [bars[name][part] for name in names]
        axis.barh(names, widths, left=left, color=colour, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    if free <= FAR * max(left):
        axis.axvline(free, color=LINE, linestyle="--", label="free")
    axis.set(xlabel=unit, title=f"free: {free:.4g} {unit}")
    axis.legend(fontsize=8)
    return figure


def texts_figure(values: Tensor, mask: Tensor, title: str) -> Figure:
    """Draw a number of each token, a line for each of the first texts.

    Args:
        values: Shape ``(texts, length)``.
        mask: Where there are tokens.
        title: What the number is.

    Raises:
        ImportError: If matplotlib is missing.
    """
    shown = values[:TEXTS].double().masked_fill(~mask[:TEXTS], float("nan"))
    figure = new_figure(8.4, max(1.2 + 0.25 * len(shown), LEAST_HEIGHT))
    axis = figure.subplots()
    image = axis.imshow(shown.tolist(), aspect="auto", cmap="Reds", interpolation="nearest")
    figure.colorbar(image, label=title)
    axis.set(xlabel="token", ylabel="text")
    axis.set_yticks(range(len(shown)))
    return figure
