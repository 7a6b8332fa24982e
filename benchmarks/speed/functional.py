"""Cost of the functional interface, against bayesian_lora 0.0.6 on the same model and batch.

`jacobian_mean` against its namesake (`torch.func.jacrev`), and `calculate_kronecker_factors`
against its namesake at equal Fisher type: one label drawn for each example, one backward pass.
bayesian_lora sums the covariances of the last token alone, this library by default those of all.
bayesian_lora is no dependency; install it for this benchmark alone, without its own::

    pip install --no-deps bayesian_lora==0.0.6 jaxtyping wadler-lindig
    python -m benchmarks.speed.functional --repeats 5
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import arguments, memory
from benchmarks.harness.llama import Workload, make_workload, random_llama
from benchmarks.harness.report import gain_cells, verdict, write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from laplace_lora.functional import calculate_kronecker_factors, jacobian_mean

NAME = "speed.functional"
JACOBIAN, DENSE, LOW_RANK = "jacobian_mean", "factors, dense", "factors, low-rank"
LAST = "factors, low-rank, last token"
FASTER = {JACOBIAN: 12.0, DENSE: 1.0, LOW_RANK: 1.0, LAST: 1.0}
MEMORY_SHARE = 0.5  # of the peer's peak, of jacobian_mean


def make_runs(work: Workload, args: argparse.Namespace) -> dict[str, tuple[Run, Run]]:
    """Return this library's run and the peer's, by what they compute."""
    try:
        from bayesian_lora import calculate_kronecker_factors as peer_factors
        from bayesian_lora.main import jacobian_mean as peer_jacobian_mean
    except ImportError as error:
        raise SystemExit(f"{error}; --help says how to install bayesian_lora") from None
    model = work.model.model
    inputs = {key: value for key, value in work.batch.items() if key != "labels"}
    ids = torch.arange(work.classes, device=args.device)

    def forward_call(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).logits[:, -1][:, ids]

    def pair(rank: int | None, positions: str = "all") -> tuple[Run, Run]:
        data = [inputs] * args.batches
        common = (model, forward_call, data, rank, args.low_rank_threshold, ["lora"])
        return (
            lambda: calculate_kronecker_factors(*common, num_samples=1, positions=positions),
            lambda: peer_factors(*common),
        )

    def callback(outputs: Any) -> Tensor:
        return outputs.logits[:, -1][:, ids]

    jacobians = (
        lambda: jacobian_mean(model, inputs, ids),
        # its default callback raises NameError
        lambda: peer_jacobian_mean(model, inputs, output_callback=callback),
    )
    return {
        JACOBIAN: jacobians,
        DENSE: pair(None),
        LOW_RANK: pair(args.factor_rank),
        LAST: pair(args.factor_rank, "last"),
    }


def time_rows(
    work: Workload, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, list[float]]]:
    """Time both sides of every pair; return the table and all seconds."""
    pairs = make_runs(work, args)
    runs = {f"{name}, ours": ours for name, (ours, _) in pairs.items()}
    runs |= {f"{name}, theirs": theirs for name, (_, theirs) in pairs.items()}
    seconds = time_in_turn(runs, args)
    rows = []
    for name in pairs:
        gain = ratio(seconds[f"{name}, theirs"], seconds[f"{name}, ours"])
        rows.append({"what": name, **gain_cells(gain, FASTER[name])})
    return rows, seconds


def memory_rows(
    args: argparse.Namespace,
) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """Read each side's peak in a process of its own."""
    names = list(FASTER)
    sides = [f"{name}, {who}" for name in names for who in ("ours", "theirs")]
    peaks = memory.peaks_in_own_processes(NAME, sides, args.device)
    rows = []
    for name in names:
        row: dict[str, Any] = {"what": name}
        for reading in peaks[f"{name}, ours"]:
            ours, theirs = (peaks[f"{name}, {who}"][reading] for who in ("ours", "theirs"))
            row[f"ours, MiB ({reading})"] = f"{ours / memory.MIB:.1f}"
            row[f"theirs, MiB ({reading})"] = f"{theirs / memory.MIB:.1f}"
            row[f"share ({reading})"] = f"{ours / theirs:.2f}"
            if name == JACOBIAN:
                met = verdict(ours / theirs, at_most=MEMORY_SHARE)
                row[f"share ({reading})"] += f" (at most {MEMORY_SHARE}: {met})"
        rows.append(row)
    return rows, peaks


def agreement_rows(work: Workload, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Say how far the two libraries' Jacobians are apart."""
    ours, theirs = (run()[0] for run in make_runs(work, args)[JACOBIAN])
    difference = torch.cat([(ours[key] - theirs[key]).flatten() for key in theirs]).norm()
    size = torch.cat([value.flatten() for value in theirs.values()]).norm()
    return [{"what": JACOBIAN, "relative difference": f"{float((difference / size).detach()):.1e}"}]


def main() -> None:
    parser = arguments.speed_parser(__doc__)
    arguments.add_memory_arguments(parser)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--batches", type=int, default=8, help="of the data set of the factors")
    args = parser.parse_args()
    arguments.prepare(args)
    work = make_workload(random_llama(args), args, args.classes)
    if args.peak_of:
        name, _, who = args.peak_of.rpartition(", ")
        run = make_runs(work, args)[name][who == "theirs"]
        run()  # whatever is set up once is not the side's
        print(memory.peak_of_run(run, args.device, args.peak_by))
        return
    rows, seconds = time_rows(work, args)
    tables = {
        "Against bayesian_lora 0.0.6": rows,
        "Agreement": agreement_rows(work, args),
    }
    raw: dict[str, Any] = {"seconds": seconds}
    if not args.no_memory:
        tables["Peak memory"], raw["peak bytes"] = memory_rows(args)
    write_report(NAME, args, tables, raw)


if __name__ == "__main__":
    main()
