"""Cost of fitting: one batch of K-FAC against bare passes and against laplace-torch's backends.

The yardstick is a bare forward pass plus C − 1 backward passes to the outputs of all adapter maps:
no method with exact output gradients does less. Two calls of the library are timed, with dense and
with low-rank factors: ``fit`` adds a batch to running sums, which is what `KronLoraLaplace.fit`
does for each batch, and ``kron`` makes a batch's factors from nothing, which is what laplace-torch
calls and what its own backends offer. Peak memory is read for the first number of classes; the
factors themselves count. The factors of models of well-known shapes are counted in GiB, too.

    python -m benchmarks.speed.fit --repeats 7
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks.harness import arguments, memory
from benchmarks.harness.factor_memory import SHAPES, factor_memory_rows
from benchmarks.harness.llama import (
    Workload,
    bare_passes,
    make_workload,
    peer_kron_runs,
    random_llama,
)
from benchmarks.harness.report import cost_cells, gain_cells, write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from laplace_lora import LoraGGN
from laplace_lora.curvature.batch_curvature import add_factors

NAME = "speed.fit"
BARE = "bare"
AT_MOST = 1.10  # times the bare passes
FASTER = {2: 1.8}  # than a peer, by number of classes
FASTER_OTHERWISE = 1.6


def library_runs(
    work: Workload,
    args: argparse.Namespace,
    fresh: bool = False,
    kinds: Sequence[str] = ("dense", "low-rank"),
) -> dict[str, Run]:
    """Return the library's sides by name.

    Args:
        work: Model and batch.
        args: Sizes of the factors.
        fresh: Let ``fit`` start from no sums, so that a memory reading includes them.
        kinds: Which factors; dense ones of a large model are larger than the model.
    """
    runs: dict[str, Run] = {}
    for kind in kinds:
        rank = None if kind == "dense" else args.factor_rank
        backend = LoraGGN(
            work.model,
            "classification",
            factor_rank=rank,
            low_rank_threshold=args.low_rank_threshold,
        )
        batch = (backend.engine, work.batch, work.labels, backend.spec)
        sums = None if fresh else add_factors(*batch)[1]

        def fit(batch: tuple[Any, ...] = batch, sums: Any = sums) -> object:
            return add_factors(*batch, sums)

        def kron(backend: LoraGGN = backend) -> object:
            return backend.kron(work.batch, work.labels, N=len(work.labels))

        runs |= {f"fit, {kind}": fit, f"kron, {kind}": kron}
    return runs


def time_rows(
    work: Workload, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, list[float]]]:
    """Time all sides for one number of classes.

    Returns:
        Rows against the bare passes, rows against the peers, and all seconds.
    """
    runs, peers = library_runs(work, args), peer_kron_runs(work)
    bare: dict[str, Run] = {BARE: lambda: bare_passes(work, work.classes - 1)}
    seconds = time_in_turn({**bare, **runs, **peers}, args)
    against_bare = []
    for side in [*runs, *peers]:
        cost = ratio(seconds[side], seconds[BARE])
        cells = cost_cells(cost, AT_MOST if side in runs else None)
        against_bare.append({"classes": work.classes, "side": side, **cells})
    limit = FASTER.get(work.classes, FASTER_OTHERWISE)
    against_peers = []
    for side in runs:
        for peer in peers:
            cells = gain_cells(ratio(seconds[peer], seconds[side]), limit)
            row = {"classes": work.classes, "side": side, "peer": f"{peer}.kron"}
            against_peers.append(row | cells)
    return against_bare, against_peers, seconds


def main() -> None:
    parser = arguments.speed_parser(__doc__)
    arguments.add_memory_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 2])
    parser.add_argument(
        "--shapes", nargs="*", choices=SHAPES, default=list(SHAPES), help="for the factor memory"
    )
    args = parser.parse_args()
    arguments.prepare(args)
    peft_model = random_llama(args)
    if args.peak_of:
        work = make_workload(peft_model, args, args.classes[0])
        bare_passes(work, work.classes - 1)  # whatever is set up once is not the side's
        runs = {BARE: lambda: bare_passes(work, work.classes - 1)}
        runs |= library_runs(work, args, fresh=True) | peer_kron_runs(work)
        print(memory.peak_of_run(runs[args.peak_of], args.device, args.peak_by))
        return

    tables: dict[str, list[dict[str, Any]]] = {"Against bare passes": [], "Against peers": []}
    raw: dict[str, Any] = {"seconds": {}}
    for classes in args.classes:
        work = make_workload(peft_model, args, classes)
        bare_rows, peer_rows, raw["seconds"][classes] = time_rows(work, args)
        tables["Against bare passes"] += bare_rows
        tables["Against peers"] += peer_rows
    if not args.no_memory:
        sides = [row["side"] for row in bare_rows]
        peaks = memory.peaks_in_own_processes(NAME, [BARE, *sides], args.device)
        tables["Peak memory"] = [
            {"classes": args.classes[0], "side": side, **memory.cells_above(peaks, side, BARE)}
            for side in sides
        ]
        raw["peak bytes"] = peaks
    if args.shapes:
        tables["Factor memory"], raw["factor GiB"] = factor_memory_rows(args)
    write_report(NAME, args, tables, raw)


if __name__ == "__main__":
    main()
