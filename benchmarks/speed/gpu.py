"""Fit and predict at the size of Llama-3-8B on an accelerator, against bare passes and peers.

The model has Llama-3-8B's shape, random weights in bfloat16 and LoRA of rank 16 on all seven
projections (adapters in float32, as PEFT keeps them). "Bare" is a forward pass with the backward
passes to the adapters' outputs that exact curvature (classes - 1) or Jacobians (classes) need at
least. Every side is timed in turn in one process; peak memory is the caching allocator's, reset
before each side. A peer that cannot run on this model is reported with its error.

    python -m benchmarks.speed.gpu                                    # an 80 GB accelerator
    python -m benchmarks.speed.gpu --device cpu --dtype float32 --layers 2 --hidden 64 ...
"""

from __future__ import annotations

import argparse
import gc
from typing import Any

import torch

from benchmarks.harness import arguments
from benchmarks.harness.llama import (
    ALL_PROJECTIONS,
    Workload,
    bare_passes,
    make_workload,
    peer_kron_runs,
    random_llama,
)
from benchmarks.harness.memory import MIB, peak_of_run
from benchmarks.harness.report import verdict, write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from benchmarks.speed.fit import library_runs
from benchmarks.speed.predict import library_run

LLAMA_3_8B = {
    "hidden": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "intermediate": 14336,
    "vocab": 128256,
    "targets": list(ALL_PROJECTIONS),
    "rank": 16,
    "tokens": 256,
    "batch": 4,
    "dtype": "bfloat16",
}
FIT_AT_MOST, PREDICT_AT_MOST, MEMORY_AT_MOST = 1.10, 1.25, 1.05


def runnable(runs: dict[str, Run]) -> tuple[dict[str, Run], dict[str, str]]:
    """Run every side once; return those that work, and the errors of the others."""
    good, failed = {}, {}
    for name, run in runs.items():
        try:
            run()
            good[name] = run
        except Exception as error:  # a peer may fail in any way
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return good, failed


def rows(
    what: str, bare: Run, runs: dict[str, Run], peers: dict[str, Run], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Time one kind of work and read its peaks, library and peers against the bare passes."""
    limit = FIT_AT_MOST if what == "fit" else PREDICT_AT_MOST
    good, failed = runnable({**runs, **peers})
    seconds = time_in_turn({"bare": bare, **good}, args)
    peaks = {name: peak_of_run(run, args.device, "records") for name, run in good.items()}
    bare_peak = peak_of_run(bare, args.device, "records")
    cells = []
    for name in [*runs, *peers]:
        if name in failed:
            cells.append({"side": name, "times bare": failed[name], "": "-", "peak": "-", " ": "-"})
            continue
        cost, share = ratio(seconds[name], seconds["bare"]), peaks[name] / bare_peak
        ours = name in runs
        memory = f"{share:.2f} of bare's {bare_peak / MIB:.0f} MiB"
        cells.append(
            {
                "side": name,
                "times bare": str(cost),
                "": verdict(cost.median, at_most=limit) if ours else "-",
                "peak": memory,
                " ": verdict(share, at_most=MEMORY_AT_MOST) if ours and what == "fit" else "-",
            }
        )
    return cells


def fit_rows(work: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one batch of a fit with low-rank factors."""
    name = "fit, low-rank"
    ours = {name: library_runs(work, args)[name]}
    peers = {} if args.no_peers else dict(peer_kron_runs(work))
    return rows("fit", lambda: bare_passes(work, work.classes - 1), ours, peers, args)


def predict_rows(work: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure mean and covariance of a batch's logits."""
    ours = {"predict, low-rank": library_run(work, args, args.factor_rank)}
    return rows("predict", lambda: bare_passes(work, work.classes), ours, {}, args)


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=5)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--prior-precision", type=float, default=1.0)
    parser.add_argument("--no-peers", action="store_true", help="leave laplace-torch's own out")
    parser.set_defaults(device="cuda", low_rank_threshold=512, **LLAMA_3_8B)
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no accelerator here; --device cpu takes smaller sizes, see --help")
    arguments.prepare(args)
    work = make_workload(random_llama(args), args, args.classes)
    tables = {
        "Fit, one batch": fit_rows(work, args),
        "Predict, one batch": predict_rows(work, args),
    }
    write_report("speed.gpu", args, tables, {"adapter weights": work.n_parameters})


if __name__ == "__main__":
    main()
