"""Reports of the benchmarks: cells, tables and files."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch

import laplace_lora
from benchmarks.harness.timing import Ratio
from examples.support import table

PACKAGES = ("torch", "transformers", "peft", "laplace_lora")


def verdict(value: float, at_most: float | None = None, at_least: float | None = None) -> str:
    """Say whether a figure keeps its limit: ``pass``, or ``miss`` with the distance in percent."""
    if at_most is not None:
        return "pass" if value <= at_most else f"miss by {100 * (value / at_most - 1):.0f} %"
    if at_least is not None:
        return "pass" if value >= at_least else f"miss by {100 * (1 - value / at_least):.0f} %"
    raise ValueError("give at_most or at_least")


def cost_cells(cost: Ratio, at_most: float | None) -> dict[str, Any]:
    """Return the cells for a cost in bare passes; a peer has no limit."""
    met = "-" if at_most is None else verdict(cost.median, at_most=at_most)
    return {"times bare (quartiles)": str(cost), "at most": at_most or "-", "": met}


def gain_cells(gain: Ratio, at_least: float) -> dict[str, Any]:
    """Return the cells for the gain over a peer."""
    met = verdict(gain.median, at_least=at_least)
    return {"times faster (quartiles)": str(gain), "at least": at_least, "": met}


def mean_and_error(values: Sequence[float], digits: int = 3, error: float | None = None) -> str:
    """Format a mean with its standard error.

    Args:
        values: At least one.
        digits: Behind the point.
        error: Standard error of a single value, where it is known.
    """
    if len(values) > 1:
        error = statistics.stdev(values) / len(values) ** 0.5
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if error is None else f"{mean} ± {error:.{digits}f}"


def write_report(
    name: str, args: argparse.Namespace, tables: Mapping[str, list[dict[str, Any]]], raw: Any
) -> None:
    """Print the tables, and write them as Markdown and, with the raw figures, as JSON.

    Args:
        name: Of the benchmark's module below ``benchmarks``; the files are named after it.
        args: The benchmark's arguments; ``args.out`` is the folder.
        tables: Rows by heading.
        raw: Whatever the tables were computed from; must be JSON.

    Raises:
        SystemExit: If a table has no rows; nothing is written.
    """
    empty = [heading for heading, rows in tables.items() if not rows]
    if empty:
        raise SystemExit(f"no figures in {args.out} for: {', '.join(empty)}")
    command = shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "command": command,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "peft": version("peft"),
        "laplace_lora": laplace_lora.__version__,
        "python": platform.python_version(),
        "device": torch.get_device_module(torch.device(args.device)).get_device_name()
        if torch.device(args.device).type == "cuda"
        else f"{args.device}, {args.threads} threads",
    }
    versions = ", ".join(f"{name} {machine[name]}" for name in PACKAGES)
    text = [f"# {name}", f"`{command}` ({machine['date']}, {versions}, {machine['device']})"]
    for heading, rows in tables.items():
        text += [f"## {heading}", table(rows)]
    report = "\n\n".join(text) + "\n"
    print(report)
    stem = name.replace(".", "-")
    (args.out / f"{stem}.md").write_text(report)
    content = {"machine": machine, "tables": dict(tables), "raw": raw}
    (args.out / f"{stem}.json").write_text(json.dumps(content, indent=1) + "\n")
