"""The section of a model card that describes a posterior; the rest of the card stays as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from laplace_lora.display.tables import in_markdown, with_error

CARD = "README.md"
PICTURE = "laplace_calibration.png"
BEGIN, END = "<!-- laplace_lora: begin -->", "<!-- laplace_lora: end -->"
NEW = """---
library_name: peft
tags:
- laplace-lora
- uncertainty
- calibration
---

# {name}

"""


class Report(Protocol):
    """Scores of a method, as `evaluation.evaluate` returns them."""

    @property
    def name(self) -> str:
        """Of the method."""
        ...

    @property
    def values(self) -> Mapping[str, float]:
        """Metrics by name."""
        ...

    @property
    def errors(self) -> Mapping[str, float]:
        """Their standard errors."""
        ...

    def plot(self) -> Any:
        """Return a figure."""
        ...


def section(
    facts: Mapping[str, str],
    code: str,
    version: str,
    reports: Sequence[Report],
    picture: str | None,
) -> str:
    """Return the section, between comments by which it is found again.

    Args:
        facts: What the posterior is, by topic.
        code: How it is loaded.
        version: Of this library.
        reports: Scores of methods on held-out data.
        picture: Name of a picture of the calibration, if there is one.
    """
    parts = [
        "## Uncertainty",
        "Beside the adapter lies a Laplace posterior over its weights, fitted with laplace_lora "
        f"{version}. Predictions then account for the uncertainty about these weights.",
        _table([("", ""), *facts.items()]),
        f"```python\n{code}\n```",
    ]
    if reports:
        names = list(dict.fromkeys(metric for report in reports for metric in report.values))
        head = ("on held-out data, ± standard error", *(report.name for report in reports))
        rows = [(metric, *(_cell(report, metric) for report in reports)) for metric in names]
        parts += ["### Calibration", _table([head, *rows])]
    if picture is not None:
        parts.append(f"![Reliability diagram, confidences and risk-coverage curve]({picture})")
    return "\n\n".join([BEGIN, *parts, END])


def with_section(card: str | None, text: str, repo_id: str) -> str:
    """Return a card with the section in place of an earlier one, or at the end.

    Args:
        card: As it is; ``None`` makes a new one.
        text: The section.
        repo_id: The repository, the title of a new card.
    """
    if card is None:
        return NEW.format(name=repo_id.rpartition("/")[2]) + text + "\n"
    earlier = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", flags=re.S)
    if earlier.search(card):
        return earlier.sub(lambda _: text, card, count=1)
    return f"{card.rstrip()}\n\n{text}\n"


def draw(report: Report, folder: Path) -> str | None:
    """Write a picture of a report, and return its name; ``None`` without matplotlib."""
    try:
        figure = report.plot()
    except ImportError:
        return None
    figure.savefig(folder / PICTURE)
    return PICTURE


def _cell(report: Report, metric: str) -> str:
    if metric not in report.values:
        return "-"
    return with_error(report.values[metric], report.errors[metric])


def _table(rows: Sequence[Sequence[str]]) -> str:
    cells = [list(map(in_markdown, row)) for row in rows]
    cells.insert(1, ["---"] * len(cells[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
