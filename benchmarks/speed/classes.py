"""Cost of predicting by the number of classes: exact moments against samples in forward mode.

Exact moments cost a backward pass for each contrast of the logits, and their algebra; samples of
the linearised model about 1.5 forward passes for each antithetic pair, whatever the classes. Times
are in forward passes of the same batch. ``auto`` takes the cheaper way.

    python -m benchmarks.speed.classes --repeats 3
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import arguments, memory
from benchmarks.harness.llama import make_workload, random_llama
from benchmarks.harness.report import write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from laplace_lora import KronLoraLaplace
from laplace_lora.predictive.linear_samples import SAMPLES, takes_samples

NAME = "speed.classes"
FORWARD, EXACT, SAMPLED = "forward", "exact", "sampled"


def make_runs(args: argparse.Namespace, classes: int) -> tuple[dict[str, Run], bool]:
    """Return what is timed, by name, and whether ``auto`` samples."""
    work = make_workload(random_llama(args), args, classes)
    la = KronLoraLaplace(
        work.model,
        "classification",
        factor_rank=args.factor_rank,
        low_rank_threshold=args.low_rank_threshold,
        backend_kwargs={"stochastic": True, "num_samples": 1},
        prior_precision=100.0,
    )
    la.fit(DataLoader(work.examples, batch_size=len(work.labels)), evidence_correction=False)
    batch = {key: value for key, value in work.batch.items() if key != "labels"}

    def forward() -> Any:
        with torch.no_grad():
            return work.model(batch)

    runs: dict[str, Run] = {
        FORWARD: forward,
        EXACT: lambda: la(batch, method="exact"),
        SAMPLED: lambda: la(batch, method="sampled", n_samples=args.samples),
    }
    return runs, takes_samples(la.fitted, "auto", "quadrature", args.samples)


def time_row(args: argparse.Namespace, classes: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Time both ways for a number of classes."""
    runs, samples = make_runs(args, classes)
    seconds = time_in_turn(runs, args)
    row = {
        "classes": classes,
        "exact, forward passes": str(ratio(seconds[EXACT], seconds[FORWARD])),
        f"{args.samples} samples, forward passes": str(ratio(seconds[SAMPLED], seconds[FORWARD])),
        "exact / sampled": str(ratio(seconds[EXACT], seconds[SAMPLED])),
        "auto": SAMPLED if samples else EXACT,
    }
    return row, seconds


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=3)
    arguments.add_memory_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4, 16, 77, 150])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    args = parser.parse_args()
    arguments.prepare(args)
    if args.peak_of:
        runs, _ = make_runs(args, max(args.classes))
        runs[FORWARD]()  # whatever is set up once is not the side's
        print(memory.peak_of_run(runs[args.peak_of], args.device, args.peak_by))
        return
    rows, raw = [], {}
    for classes in args.classes:
        row, raw[f"{classes} classes"] = time_row(args, classes)
        rows.append(row)
    tables = {"Predicting a batch": rows}
    if not args.no_memory:
        sides = [FORWARD, EXACT, SAMPLED]
        peaks = raw["peak bytes"] = memory.peaks_in_own_processes(NAME, sides, args.device)
        tables[f"Peak memory with {max(args.classes)} classes"] = [
            {"side": side, **memory.cells_above(peaks, side, FORWARD)} for side in sides[1:]
        ]
    write_report(NAME, args, tables, raw)


if __name__ == "__main__":
    main()
