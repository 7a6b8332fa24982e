"""What ``laplace-lora evaluate`` does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from laplace_lora.commands.base import note
from laplace_lora.commands.beside import loader_beside, read_beside
from laplace_lora.commands.output import as_json, check_writable, result_file
from laplace_lora.commands.reading.columns import cell, present_in
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.likelihood import WITH_CLASSES
from laplace_lora.commands.reading.names import read_as_numbered
from laplace_lora.commands.reading.opened import open_posterior
from laplace_lora.commands.reading.rows import STANDARD, Row, read_named, read_rows
from laplace_lora.commands.reading.said import cuts_said
from laplace_lora.display.tables import with_error
from laplace_lora.evaluation import MAP, CalibrationReport, plot_reports
from laplace_lora.evaluation import evaluate as scores_of

# What of a row there is instead of scores.
WRITTEN = {
    "predict": "gives mean and standard deviation, or of preference pairs probabilities; --keep "
    "puts columns of the data beside them",
    "score": "gives each token's probability and uncertainty",
}
OF_TOKENS = ("token_classification", "question_answering")
PICTURES = (".png", ".pdf", ".svg")


def run(
    adapter: str,
    data: str,
    ood: str | None,
    out: str | None,
    plot: str | None,
    group_field: str | None,
    apart: str | None,
    coverage: float | None,
    risk: float | None,
    **options: Any,
) -> None:
    """Score MAP and posterior on the same rows."""
    if risk is not None and apart is None:
        raise ValueError("--risk is kept on labelled data of their own: give them by --apart")
    if coverage is not None and apart is None:
        raise ValueError("--coverage is that of sets from labelled data: give them by --apart")
    if plot is not None and Path(plot).suffix not in PICTURES:
        raise ValueError(f"--plot {plot}: expected a file in {', '.join(PICTURES)}")
    for name, value in (("--out", out), ("--plot", plot)):
        if value is not None:
            check_writable(value, name, [data, ood, apart])
    rows, classes = read_named(data, options["split"])
    ood_rows = None if ood is None else read_rows(ood)
    apart_rows, apart_classes = (None, {}) if apart is None else read_named(apart)
    groups = None if group_field is None else _groups(rows, group_field)
    opened = open_posterior(adapter, rows, options, check=_check_has_classes)
    plan, batch_size = opened.plan, options["batch_size"]
    inputs = Inputs(opened.adapter, read_as_numbered(plan, classes, options, f"--data {data}"))
    loader = inputs.loader(rows, batch_size)
    note(cuts_said(inputs, loader.dataset, rows))
    other, own = None, None
    if ood_rows is not None:
        with read_beside(ood_rows, plan.columns, f"--ood {ood}"):
            texts = inputs.texts(ood_rows)
        note(cuts_said(inputs, texts, ood_rows, f"--ood {ood}"))
        unlabelled: Any = texts
        pad = DataCollatorWithPadding(opened.adapter.tokenizer)
        other = DataLoader(unlabelled, batch_size, collate_fn=pad)
    if apart_rows is not None:
        source = f"--apart {apart}"
        own = loader_beside(opened.inputs, apart_rows, apart_classes, options, source)
    quietly = partial(opened.la.predict, progress_bar=False)
    adapter_alone = MAP(opened.la.logits_model, likelihood=plan.likelihood)
    methods: dict[str, Any] = {"MAP": adapter_alone, "Laplace": quietly}
    given: dict[str, Any] = {
        "ood_loader": other,
        "conformal_loader": own,
        "risk": risk,
        "groups": groups,
    }
    if coverage is not None:
        given["coverage"] = coverage
    reports = [scores_of(method, loader, name=name, **given) for name, method in methods.items()]
    content = as_json([report.to_dict() for report in reports], indent=1)
    if out is not None and out != STANDARD:
        with result_file(out) as file:
            file.write(content.encode())
    if plot is not None:
        with result_file(plot) as file:
            plot_reports(reports).savefig(file, format=Path(plot).suffix[1:])
    if out == STANDARD:
        click.echo(content.encode())
        return
    console = Console()
    console.print(_table(reports, "all rows"))
    for report in reports if risk is not None else ():
        click.echo(f"{report.name}: {_rule(report.threshold)}")
    for group in reports[0].by_group:
        parts = [report.by_group[group] for report in reports]
        named = [replace(part, name=r.name) for part, r in zip(parts, reports, strict=True)]
        console.print(_table(named, f"{group_field} {group}"))


def _check_has_classes(likelihood: str) -> None:
    if likelihood in OF_TOKENS:
        raise ValueError(
            f"evaluate scores class probabilities of texts; this is a {likelihood} posterior, "
            "which no command asks. From Python, `la.predict` gives its predictions"
        )
    if likelihood not in WITH_CLASSES:
        command = "score" if likelihood == "language_modeling" else "predict"
        raise ValueError(
            f"evaluate scores class probabilities; this is a {likelihood} posterior. "
            f"`laplace-lora {command}` {WRITTEN[command]}"
        )


def _rule(threshold: float | None) -> str:
    """Return when to answer, with all digits: what was shown holds for this threshold alone."""
    if threshold is None or threshold >= 1:
        return "answer nothing; no threshold could be shown to keep the risk"
    return f"answer where a probability is above {threshold!r}"


def _groups(rows: list[Row], name: str) -> list[str]:
    """Return the group of each row."""
    known = name if name in present_in(rows) else None
    return [str(cell(row, known, n, "group", "--group-field")) for n, row in enumerate(rows, 1)]


def _table(reports: list[CalibrationReport], title: str) -> Table:
    # No string, which rich reads as markup: a group "[en]" would lose its name, "[/]" the table.
    heading = Text(f"{title}: {len(reports[0].labels)}", style="table.title")
    table = Table(title=heading, title_justify="left")
    table.add_column("")
    for report in reports:
        table.add_column(report.name, justify="right")
    for metric in dict.fromkeys(m for report in reports for m in report.values):
        cells = [
            with_error(r.values[metric], r.errors[metric]) if metric in r.values else "-"
            for r in reports
        ]
        table.add_row(metric, *cells)
    return table
