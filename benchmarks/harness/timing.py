"""Paired timings.

Times on a shared machine drift, so nothing here reports an absolute time alone: every side is
warmed up once, then all sides run in turn (A B C, A B C, ...) in one process, and a ratio is the
median over the rounds of the ratio *within* a round. See `memory` for peak memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}

Run = Callable[[], object]


def synchronize(device: str) -> None:
    """Wait for an accelerator's queued work; nothing to wait for on the CPU."""
    if torch.device(device).type != "cpu":
        torch.get_device_module(torch.device(device)).synchronize()


def time_in_turn(sides: Mapping[str, Run], args: argparse.Namespace) -> dict[str, list[float]]:
    """Time all sides in turn, after one warm-up of each.

    Args:
        sides: What to run, by name.
        args: ``repeats`` timed rounds on ``clock``; the queue of ``device`` ends a timing.

    Returns:
        Seconds of every round, by name; entries with the same index are of the same round.
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
