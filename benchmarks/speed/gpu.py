"""A run on an accelerator that needs no thought: tests, then costs at 0.1, 1 and 8 B parameters.

The models have the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3-8B, random weights in bfloat16
built on the device, and LoRA of rank 16 on all seven projections (adapters in float32, as PEFT
keeps them). "Bare" is a forward pass with the backward passes to the adapters' outputs that exact
curvature (classes - 1) or Jacobians (classes) need at least. Every side is timed in turn in one
process; peaks are the caching allocator's, above the level before the run. A peer that cannot run
is reported with its error.

Steps run in order of importance; what each found is written at once, and a step that fails or
outlasts the time is noted, so a run that is cut short keeps what it has.

    python -m benchmarks.speed.gpu --minutes 6
    python -m benchmarks.speed.gpu --steps "8 B" --batch 8    # an accelerator with 80 GB
    python -m benchmarks.speed.gpu --device cpu --tiny        # a rehearsal
"""

from __future__ import annotations

import argparse
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.harness import arguments
from benchmarks.harness.llama import ALL_PROJECTIONS
from benchmarks.harness.report import write_report
from benchmarks.speed.gpu_steps import STEPS, Tables, release

SHORTEST = 15  # seconds below which no step is begun


class OutOfTime(BaseException):
    """The time of a step is over; no `Exception`, which a step takes for a side that cannot run."""


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` when a block takes longer than some seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime(f"cut off after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_step(step: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one step.

    Args:
        step: Its name.
        args: The command line's arguments.
        seconds: The most it may take.

    Returns:
        ``tables`` and ``raw``; of a step that failed, what it had found and a table that says why.
    """
    start = time.perf_counter()
    tables: Tables = {}
    try:
        with alarm(seconds):
            raw = STEPS[step](args, tables)
    except (Exception, OutOfTime) as error:  # the next step may work
        traceback.print_exc()
        raw = f"{type(error).__name__}: {error}"
        tables[step] = [{"failed": raw[:200]}]
    release()
    return {"tables": tables, "raw": raw, "took": time.perf_counter() - start}


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=5)
    parser.add_argument("--minutes", type=float, default=6.0, help="when to stop")
    parser.add_argument("--longest", type=float, default=120.0, help="seconds a step may take")
    parser.add_argument("--tiny", action="store_true", help="rehearse with tiny models")
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 2])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--tests", nargs="*", default=[], help="options of the tests, as -k name")
    parser.set_defaults(
        device="cuda",
        dtype="bfloat16",
        low_rank_threshold=512,
        tokens=256,
        batch=16,
        rank=16,
        targets=list(ALL_PROJECTIONS),
        quantised=None,
        prior_precision=100.0,
    )
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no accelerator here; --device cpu --tiny rehearses the run")
    arguments.prepare(args)
    end = time.perf_counter() + 60 * args.minutes
    tables, found = {}, {}
    for step in args.steps:
        left = end - time.perf_counter()
        if left < SHORTEST:
            tables[step] = [{"not run": "no time left"}]
            continue
        found[step] = run_step(step, args, min(left, args.longest))
        tables |= found[step]["tables"]
        write_report("speed.gpu", args, tables, found)
    write_report("speed.gpu", args, tables, found)


if __name__ == "__main__":
    main()
