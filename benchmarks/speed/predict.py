"""Cost of predicting: the GLM predictive against bare passes and against laplace-torch's.

The predictive is the mean and the full C × C covariance of every example in a batch. The yardstick
is a bare forward pass plus C backward passes to the outputs of all adapter maps. laplace-torch's
default is `CurvlinopsGGN.jacobians` (`torch.func.jacrev`) and `KronDecomposed.inv_square_form`;
`AsdlGGN.jacobians`, the quicker of its Jacobians, is timed alone, without any covariance.

All posteriors are fitted beforehand, on the batch itself. As it has no padding, the dense posterior
and laplace-torch's must predict the same covariance; the report says how close they are.

    python -m benchmarks.speed.predict --repeats 5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import arguments, memory
from benchmarks.harness.llama import (
    Workload,
    bare_passes,
    make_workload,
    peer_backends,
    random_llama,
)
from benchmarks.harness.report import cost_cells, gain_cells, verdict, write_report
from benchmarks.harness.timing import ratio, time_in_turn
from laplace_lora import KronLoraLaplace

NAME = "speed.predict"
BARE = "bare"
JACREV, ASDL = "CurvlinopsGGN", "AsdlGGN"
PEERS = {JACREV: "laplace-torch's default", ASDL: "AsdlGGN.jacobians alone"}
AT_MOST = 1.25  # times the bare passes
FASTER = {JACREV: 12.0, ASDL: 2.0}
MEMORY_SHARE = 0.75  # of the Jacobian of all adapter weights, in float32

Run = Callable[[], Any]


def fitted(work: Workload, args: argparse.Namespace, factor_rank: int | None) -> KronLoraLaplace:
    """Return a posterior that is fitted on the batch."""
    la = KronLoraLaplace(
        work.model,
        "classification",
        factor_rank=factor_rank,
        low_rank_threshold=args.low_rank_threshold,
        prior_precision=args.prior_precision,
    )
    la.fit(DataLoader(work.examples, batch_size=len(work.labels)))
    return la


def library_run(work: Workload, args: argparse.Namespace, factor_rank: int | None) -> Run:
    """Fit a posterior on the batch and return its predictive."""
    la = fitted(work, args, factor_rank)
    return lambda: la._glm_predictive_distribution(work.batch)


def peer_run(work: Workload, args: argparse.Namespace, name: str) -> Run:
    """Return laplace-torch's default predictive on its own factors, or ASDL's Jacobians alone."""
    backend: Any = peer_backends([name], work)[name]
    if name == ASDL:
        return lambda: backend.jacobians(work.batch)
    _, kron = backend.kron(work.batch, work.labels, N=len(work.labels))
    prior = torch.tensor([args.prior_precision], device=args.device)
    precision = kron.decompose() + prior

    def predictive() -> tuple[torch.Tensor, torch.Tensor]:
        jacobians, mean = backend.jacobians(work.batch)
        return mean, precision.inv_square_form(jacobians)

    return predictive


def make_run(side: str, work: Workload, args: argparse.Namespace) -> Run:
    """Prepare one side by name; whatever it needs is fitted here."""
    if side == BARE:
        return lambda: bare_passes(work, work.classes)
    if side in PEERS:
        return peer_run(work, args, side)
    return library_run(work, args, None if side == "dense" else args.factor_rank)


def time_rows(
    work: Workload, args: argparse.Namespace
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, Any]]:
    """Time all sides and compare the covariances; return the tables and the raw figures."""
    library = ["dense", "low-rank"]
    runs = {side: make_run(side, work, args) for side in [BARE, *library, *PEERS]}
    seconds = time_in_turn(runs, args)
    bare_rows, peer_rows = [], []
    for side in [*library, *PEERS]:
        cost = ratio(seconds[side], seconds[BARE])
        cells = cost_cells(cost, AT_MOST if side in library else None)
        bare_rows.append({"classes": work.classes, "side": PEERS.get(side, side), **cells})
    for side in library:
        for peer, limit in FASTER.items():
            cells = gain_cells(ratio(seconds[peer], seconds[side]), limit)
            row = {"classes": work.classes, "side": side, "peer": PEERS[peer]}
            peer_rows.append(row | cells)
    expected = runs[JACREV]()[1]
    differences = {
        side: float((runs[side]()[1] - expected).norm() / expected.norm()) for side in library
    }
    agreement = [
        {"classes": work.classes, "side": side, "relative difference": f"{difference:.1e}"}
        for side, difference in differences.items()
    ]
    tables = {
        "Against bare passes": bare_rows,
        "Against peers": peer_rows,
        "Covariances against laplace-torch's default": agreement,
    }
    return tables, {"seconds": seconds, "relative difference": differences}


def memory_rows(
    work: Workload, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, dict[str, int]]]:
    """Read every side's peak in a process of its own; rows are above the bare passes' peak."""
    sides = [BARE, "dense", "low-rank", *PEERS]
    peaks = memory.peaks_in_own_processes(NAME, sides, args.device)
    jacobian = len(work.labels) * work.classes * work.n_parameters * 4
    rows = []
    for side in sides[1:]:
        row: dict[str, Any] = {"classes": work.classes, "side": PEERS.get(side, side)}
        row |= memory.cells_above(peaks, side, BARE)
        for reading, peak in peaks[side].items():
            share = (peak - peaks[BARE][reading]) / jacobian
            row[f"of the Jacobian ({reading})"] = f"{share:.2f}"
            if side not in PEERS:
                met = verdict(share, at_most=MEMORY_SHARE)
                row[f"of the Jacobian ({reading})"] += f" (at most {MEMORY_SHARE}: {met})"
        rows.append(row)
    return rows, peaks


def main() -> None:
    parser = arguments.speed_parser(__doc__)
    arguments.add_memory_arguments(parser)
    parser.add_argument("--classes", type=int, nargs="+", default=[4])
    parser.add_argument("--prior-precision", type=float, default=1.0)
    args = parser.parse_args()
    arguments.prepare(args)
    peft_model = random_llama(args)
    if args.peak_of:
        work = make_workload(peft_model, args, args.classes[0])
        run = make_run(args.peak_of, work, args)
        bare_passes(work, work.classes)  # whatever is set up once is not the side's
        print(memory.peak_of_run(run, args.device, args.peak_by))
        return

    tables: dict[str, list[dict[str, Any]]] = {}
    raw: dict[str, Any] = {}
    for classes in args.classes:
        work = make_workload(peft_model, args, classes)
        timed, raw[f"{classes} classes"] = time_rows(work, args)
        for heading, rows in timed.items():
            tables.setdefault(heading, []).extend(rows)
    if not args.no_memory:
        work = make_workload(peft_model, args, args.classes[0])
        tables["Peak memory"], raw["peak bytes"] = memory_rows(work, args)
    write_report(NAME, args, tables, raw)


if __name__ == "__main__":
    main()
