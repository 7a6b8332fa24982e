"""Cost of tuning on a validation set: a grid of prior precisions against one predictive pass.

laplace-torch's own grid search predicts the whole validation set anew for every value. Here one
pass serves all of them. The report gives the time of a grid search over ``--grid`` values divided
by that of one predictive pass over the same loader, the same for laplace-torch's loop (timed for
``--peer-grid`` values, as its cost is proportional to their number), and how far apart the losses
of the two searches are on the same posterior.

    python -m benchmarks.speed.prior --clock cpu --repeats 3 --validation 16
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from laplace.baselaplace import BaseLaplace
from laplace.utils.metrics import RunningNLLMetric
from torch.utils.data import DataLoader

from benchmarks.harness import arguments
from benchmarks.harness.llama import make_workload, random_llama
from benchmarks.harness.report import verdict, write_report
from benchmarks.harness.timing import ratio, time_in_turn
from laplace_lora import KronLoraLaplace
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import scoring_of
from laplace_lora.tuning.validation.search import grid_search

AT_MOST = 1.5  # times one predictive pass
CLOSE = 1e-5  # losses of the two searches


def fitted_posterior(args: argparse.Namespace, factor_rank: int | None) -> tuple[Any, DataLoader]:
    """Fit a posterior on random batches, and return it with a validation loader."""
    work = make_workload(random_llama(args), args, args.classes)
    generator = torch.Generator().manual_seed(args.seed + 2)
    examples = []
    for _ in range(args.validation):
        tokens = torch.randint(args.vocab, (args.tokens,), generator=generator)
        label = torch.randint(args.classes, (), generator=generator)
        examples.append(
            {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": label}
        )
    loader = DataLoader(examples, batch_size=args.batch)
    la = KronLoraLaplace(
        work.model,
        "classification",
        factor_rank=factor_rank,
        low_rank_threshold=args.low_rank_threshold,
    )
    la.fit(loader)
    return la, loader


def compare(la: Any, loader: DataLoader, args: argparse.Namespace) -> tuple[dict, dict]:
    """Time one pass, our search and laplace-torch's loop in turn, and compare their losses."""
    grid = torch.logspace(-4, 4, args.grid)
    few = torch.logspace(-4, 4, args.peer_grid)
    search = (Predictor(la.fitted), loader)
    scoring = (scoring_of(la.fitted, "probit", 1), None, False)
    options = {"pred_type": "glm", "link_approx": "probit", "n_samples": 1}

    def one_pass() -> None:
        for batch in loader:
            la(batch)

    def peer_losses(values: torch.Tensor) -> torch.Tensor:
        losses = []
        for value in values:
            metric = RunningNLLMetric().to(args.device)
            BaseLaplace._gridsearch(la, metric, value.reshape(1), loader, **options)
            losses.append(metric.compute().double())
        return torch.stack(losses)

    prior = la.prior_precision
    seconds = time_in_turn(
        {
            "one pass": one_pass,
            "one-pass search": lambda: grid_search(*search, grid, *scoring),
            "laplace-torch": lambda: BaseLaplace._gridsearch(
                la, RunningNLLMetric().to(args.device), few, loader, **options
            ),
        },
        args,
    )
    _, ours = grid_search(*search, few, *scoring)
    theirs = peer_losses(few)
    la.prior_precision = prior
    cost = ratio(seconds["one-pass search"], seconds["one pass"])
    loop = ratio(seconds["laplace-torch"], seconds["one pass"])
    gap = float((ours - theirs).abs().max())
    all_values = loop.median * args.grid / args.peer_grid
    row = {
        f"{args.grid} values, times one pass (quartiles)": str(cost),
        "at most": AT_MOST,
        "": verdict(cost.median, at_most=AT_MOST),
        f"laplace-torch's loop, {args.grid} values": f"{all_values:.0f}",
        "largest difference of losses": f"{gap:.1e} ({verdict(gap, at_most=CLOSE)})",
        "same best value": str(bool(ours.argmin() == theirs.argmin())),
    }
    return row, {"seconds": seconds, "losses": ours.tolist(), "peer losses": theirs.tolist()}


def main() -> None:
    parser = arguments.speed_parser(__doc__, repeats=5)
    parser.add_argument("--classes", type=int, default=4)
    parser.add_argument("--validation", type=int, default=32, help="examples to validate on")
    parser.add_argument("--grid", type=int, default=100, help="values of the one-pass search")
    parser.add_argument("--peer-grid", type=int, default=5, help="values of laplace-torch's loop")
    args = parser.parse_args()
    arguments.prepare(args)
    rows, raw = [], {}
    for side, factor_rank in (("dense", None), ("low-rank", args.factor_rank)):
        row, raw[side] = compare(*fitted_posterior(args, factor_rank), args)
        rows.append({"side": side, **row})
    write_report("speed.prior", args, {"Grid search on a validation set": rows}, raw)


if __name__ == "__main__":
    main()
