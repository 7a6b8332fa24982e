"""Cost of the loss's gradient, which a fit collects beside the curvature.

The gradient is what the evidence's correction starts from. One batch of a fit is timed with and
without it. Exact roots bring it along. Sampled labels, as of language models, do not: there it
takes one more backward pass, and a fit leaves it to the evidence that needs it.

    python -m benchmarks.speed.gradient --clock cpu --repeats 9
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import arguments
from benchmarks.harness.llama import make_workload, random_llama
from benchmarks.harness.report import verdict, write_report
from benchmarks.harness.timing import Run, ratio, time_in_turn
from laplace_lora import LoraGGN
from laplace_lora.curvature import batch_curvature
from laplace_lora.curvature.batch_curvature import add_factors
from laplace_lora.curvature.loss_gradient import LossGradient

AT_MOST = 1.08  # times the fit without it
KINDS = ("K-FAC", "K-FAC, one sampled label", "diagonal, rows")


def sides(kind: str, work: Any, args: argparse.Namespace) -> dict[str, Run]:
    """Return a batch of a fit without and with the gradient."""
    sampled = {"stochastic": True, "num_samples": 1} if "sampled" in kind else {}
    backend = LoraGGN(
        work.model, "classification", factor_rank=None, low_rank_threshold=512, **sampled
    )
    engine = backend.engine
    batch: tuple[Any, ...] = (engine, work.batch, work.labels)
    gradient = LossGradient(engine.sizes, engine.dtype, engine.device)
    if kind == "diagonal, rows":
        return {
            "without": lambda: batch_curvature.diagonal(*batch),
            "with": lambda: batch_curvature.diagonal(*batch, gradient),
        }
    sums = [add_factors(*batch, backend.spec)[1] for _ in range(2)]
    return {
        "without": lambda: add_factors(*batch, backend.spec, sums[0]),
        "with": lambda: add_factors(*batch, backend.spec, sums[1], gradient),
    }


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=9)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    arguments.prepare(args)
    model = random_llama(args)
    rows, raw = [], {}
    for classes in args.classes:
        work = make_workload(model, args, classes)
        for kind in KINDS:
            seconds = time_in_turn(sides(kind, work, args), args)
            raw[f"{classes}, {kind}"] = seconds
            cost = ratio(seconds["with"], seconds["without"])
            limit = "not collected" if "sampled" in kind else verdict(cost.median, at_most=AT_MOST)
            row = {"classes": classes, "fit": kind, "with / without (quartiles)": str(cost)}
            rows.append({**row, f"at most {AT_MOST}": limit})
    write_report("speed.gradient", args, {"One batch": rows}, raw)


if __name__ == "__main__":
    main()
