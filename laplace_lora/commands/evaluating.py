"""What ``laplace-lora evaluate`` does."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from laplace_lora.commands.opened import Opened, open_posterior
from laplace_lora.commands.output import check_writable
from laplace_lora.commands.planning import WITH_CLASSES
from laplace_lora.commands.rows import Row, read_rows
from laplace_lora.evaluation import MAP, CalibrationReport, plot_reports
from laplace_lora.evaluation import evaluate as scores_of
from laplace_lora.storage.files import write_whole

PICTURES = (".png", ".pdf", ".svg")


def run(
    adapter: str,
    data: str,
    ood: str | None,
    out: str | None,
    plot: str | None,
    **options: Any,
) -> None:
    """Score MAP and posterior on the same rows."""
    for name, value in (("--out", out), ("--plot", plot)):
        if value is not None:
            check_writable(value, name)
    if plot is not None and Path(plot).suffix not in PICTURES:
        raise ValueError(f"--plot {plot}: expected a file in {', '.join(PICTURES)}")
    rows = read_rows(data, options["split"])
    ood_rows = None if ood is None else read_rows(ood)
    opened = open_posterior(adapter, rows, options)
    likelihood = opened.plan.likelihood
    if likelihood not in WITH_CLASSES:
        raise ValueError(
            f"evaluate scores class probabilities; this is a {likelihood} posterior. "
            "`laplace-lora predict` and `laplace-lora score` say what it thinks of rows"
        )
    batch_size = options["batch_size"]
    loader = opened.inputs.loader(rows, batch_size)
    other = None if ood_rows is None else _unlabelled(opened, ood_rows, batch_size)
    quietly = partial(opened.la.predict, progress_bar=False)
    methods: dict[str, Any] = {"MAP": MAP(opened.la.logits_model), "Laplace": quietly}
    reports = [
        scores_of(method, loader, name=name, ood_loader=other) for name, method in methods.items()
    ]
    if out is not None:
        content = json.dumps([report.to_dict() for report in reports], indent=1)
        write_whole(Path(out), content.encode())
    if plot is not None:
        _write_picture(reports, Path(plot))
    Console().print(_table(reports))


def _unlabelled(opened: Opened, rows: list[Row], batch_size: int) -> list[Any]:
    texts = [opened.inputs.text(row, n) for n, row in enumerate(rows, start=1)]
    pad = opened.adapter.tokenizer.pad
    starts = range(0, len(texts), batch_size)
    return [pad(texts[i : i + batch_size], return_tensors="pt") for i in starts]


def _table(reports: list[CalibrationReport]) -> Table:
    table = Table(title=f"{len(reports[0].labels)} rows", title_justify="left")
    table.add_column("")
    for report in reports:
        table.add_column(report.name, justify="right")
    for metric in dict.fromkeys(m for report in reports for m in report.values):
        cells = [
            f"{r.values[metric]:.3f} ± {r.errors[metric]:.3f}" if metric in r.values else "-"
            for r in reports
        ]
        table.add_row(metric, *cells)
    return table


def _write_picture(reports: list[CalibrationReport], path: Path) -> None:
    import io

    picture = io.BytesIO()
    plot_reports(reports).savefig(picture, format=path.suffix[1:])
    write_whole(path, picture.getvalue())
