"""Paired timings, peak memory in a process of its own, and the reports of the benchmarks.

Times on a shared machine drift, so nothing here reports an absolute time alone: every side is
warmed up once, then all sides run in turn (A B C, A B C, ...) in one process, and a ratio is the
median over the rounds of the ratio *within* a round.

Peak memory is read in a process that runs one side only. On an accelerator it is the caching
allocator's own peak. On the CPU there are two readings: ``records``, the peak of torch's record of
every CPU allocation and release (exact and repeatable, blind to what is not allocated by torch),
and ``resident``, the peak of the process's resident set above its level before the run (sees
everything, in pages, Linux only).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
READINGS = ("records", "resident")
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


def add_memory_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments by which a benchmark calls itself to read one side's peak memory."""
    parser.add_argument("--peak-of", help="only run this side once, print its peak memory, stop")
    parser.add_argument(
        "--peak-by", choices=READINGS, default="records", help="how --peak-of reads the CPU"
    )
    parser.add_argument("--no-memory", action="store_true", help="skip the memory readings")


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


def peak_of_run(run: Callable[[], object], device: str, reading: str) -> int:
    """Run once and return the peak of the bytes held above the level before the run.

    Args:
        run: What to run. Its result counts: it is still held at the end of the reading.
        device: Where the memory is read.
        reading: On the CPU, ``records`` or ``resident`` (see the module's text). An accelerator
            has its allocator's own peak and ignores this.

    Returns:
        Peak bytes.
    """
    gc.collect()
    if torch.device(device).type != "cpu":
        module = torch.get_device_module(torch.device(device))
        module.synchronize()
        module.reset_peak_memory_stats()
        before = module.memory_allocated()
        held = run()
        module.synchronize()
        peak = module.max_memory_allocated() - before
    elif reading == "resident":
        Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
        before = _kernel_bytes("VmRSS")
        held = run()
        peak = _kernel_bytes("VmHWM") - before
    else:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorder:
            held = run()
        peak = _recorded_peak(recorder)
    del held
    return peak


def _kernel_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _recorded_peak(recorder: profile) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorder.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    level = peak = 0
    for event in sorted(events, key=lambda event: event["args"]["Ev Idx"]):
        level += event["args"]["Bytes"]
        peak = max(peak, level)
    return peak


def peaks_in_own_processes(
    script: str, sides: Iterable[str], device: str, extra: Iterable[str] = ()
) -> dict[str, dict[str, int]]:
    """Start this benchmark anew for every side and reading, and collect the peaks.

    Args:
        script: Path of the benchmark, which must have the arguments of `add_memory_arguments`.
        sides: Names that the benchmark's ``--peak-of`` knows.
        device: Where the memory is read; an accelerator has one reading only.
        extra: Arguments to add to this process's own.

    Returns:
        Peak bytes by side and reading.

    Raises:
        RuntimeError: If a process fails; its error output is in the message.
    """
    # Fixed thresholds make the C allocator hand freed blocks back to the kernel at once.
    environment = dict(
        os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_ARENA_MAX="1"
    )
    readings = READINGS if torch.device(device).type == "cpu" else READINGS[:1]
    peaks: dict[str, dict[str, int]] = {}
    for side in sides:
        for reading in readings:
            command = [sys.executable, script, *sys.argv[1:], *extra]
            command += ["--peak-of", side, "--peak-by", reading]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise RuntimeError(f"reading the peak of {side} failed:\n{done.stderr}")
            peaks.setdefault(side, {})[reading] = int(done.stdout.split()[-1])
    return peaks


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
