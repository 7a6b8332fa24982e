"""Paired timings, and the arguments and reports of the benchmarks.

Times on a shared machine drift, so nothing here reports an absolute time alone: every side is
warmed up once, then all sides run in turn (A B C, A B C, ...) in one process, and a ratio is the
median over the rounds of the ratio *within* a round. Peak memory belongs to `peak_memory`.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def add_run_arguments(
    parser: argparse.ArgumentParser,
    repeats: int = 7,
    repeated: str = "timed rounds after the warm-up",
) -> None:
    """Add the arguments that every benchmark has.

    Args:
        parser: Where to add them.
        repeats: Default of ``--repeats``.
        repeated: What is repeated, for the help.
    """
    parser.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda")
    parser.add_argument(
        "--dtype", default="float32", choices=["float32", "float64", "bfloat16", "float16"]
    )
    parser.add_argument("--repeats", type=int, default=repeats, help=repeated)
    parser.add_argument(
        "--threads", type=int, default=1, help="more than one is only meaningful on idle cores"
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn at random")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the reports"
    )


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """Add the choice of the clock that times are taken from."""
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu counts this process's own time: on busy cores, with one thread",
    )


def prepare(args: argparse.Namespace) -> None:
    """Set threads and seed, and refuse what would measure nothing.

    Raises:
        ValueError: If ``repeats`` or ``threads`` is not positive, or the processor's clock is asked
            for where it would add up threads or miss an accelerator.
    """
    if args.repeats < 1 or args.threads < 1:
        raise ValueError(
            f"--repeats and --threads must be positive, got {args.repeats} and {args.threads}"
        )
    if getattr(args, "clock", "wall") == "cpu" and (
        args.threads > 1 or torch.device(args.device).type != "cpu"
    ):
        raise ValueError("--clock cpu needs --threads 1 and --device cpu")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)


def synchronize(device: str) -> None:
    """Wait for an accelerator's queued work; nothing to wait for on the CPU."""
    if torch.device(device).type != "cpu":
        torch.get_device_module(torch.device(device)).synchronize()


def time_in_turn(
    sides: Mapping[str, Callable[[], object]], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Time all sides in turn, after one warm-up of each.

    Args:
        sides: What to run, by name.
        args: ``repeats`` timed rounds on ``clock``; the queue of ``device`` ends a timing.

    Returns:
        Seconds of every round, by name; entries with the same index belong to the same round.
    """
    for run in sides.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    clock = CLOCKS[args.clock]
    for _ in range(args.repeats):
        for name, run in sides.items():
            gc.collect()
            synchronize(args.device)
            start = clock()
            run()
            synchronize(args.device)
            seconds[name].append(clock() - start)
    return seconds


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles, over the rounds, of one side's time divided by another's."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the median with the quartiles behind it."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def ratio(numerator: list[float], denominator: list[float]) -> Ratio:
    """Divide two sides' times round by round."""
    quotients = [a / b for a, b in zip(numerator, denominator, strict=True)]
    if len(quotients) == 1:
        return Ratio(quotients[0], quotients[0], quotients[0])
    low, median, high = statistics.quantiles(quotients, n=4, method="inclusive")
    return Ratio(median, low, high)


def verdict(value: float, at_most: float | None = None, at_least: float | None = None) -> str:
    """Say whether a figure keeps its limit: ``pass``, or ``miss`` with the distance in percent."""
    if at_most is not None:
        return "pass" if value <= at_most else f"miss by {100 * (value / at_most - 1):.0f} %"
    if at_least is not None:
        return "pass" if value >= at_least else f"miss by {100 * (1 - value / at_least):.0f} %"
    raise ValueError("give at_most or at_least")


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """Format rows with the same keys as a Markdown table."""
    header = list(rows[0])
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(str(row[key]) for key in header) + " |" for row in rows]
    return "\n".join(lines)


def write_report(
    name: str, args: argparse.Namespace, tables: Mapping[str, list[dict[str, Any]]], raw: Any
) -> None:
    """Print the tables, and write them as ``name.md`` and with the raw figures as ``name.json``.

    Args:
        name: File name without ending.
        args: The benchmark's arguments; ``args.out`` is the folder.
        tables: Rows by heading.
        raw: Whatever the tables were computed from; must be JSON.
    """
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    args.out.mkdir(parents=True, exist_ok=True)
    machine = {
        "command": command,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.get_device_module(torch.device(args.device)).get_device_name()
        if torch.device(args.device).type == "cuda"
        else f"{args.device}, {args.threads} threads",
    }
    text = [f"# {name}", f"`{command}` (torch {machine['torch']}, {machine['device']})"]
    for heading, rows in tables.items():
        text += [f"## {heading}", markdown_table(rows)]
    report = "\n\n".join(text) + "\n"
    print(report)
    (args.out / f"{name}.md").write_text(report)
    content = {"machine": machine, "tables": dict(tables), "raw": raw}
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
