"""Which structure of the posterior to choose: error and quality against cost, on real data.

Every structure is fitted around the checkpoints of the study, on the same training rows, and its
prior precision is tuned by its own marginal likelihood:

* error: distance of its test predictive covariance from the exact GGN's at the same prior
  precision, relative to that, in the Frobenius norm over all examples;
* evidence gap: its log evidence minus that of the exact GGN, each at its own best prior, in nats;
* NLL and ECE on the test rows with the probit and the mc link;
* cost: seconds of fit and prediction (this process's own on the CPU, one thread), and the bytes
  that the posterior stores. ``eigen s`` is the eigendecomposition of all rows of the exact GGN,
  which comes after its fit.

    python -m benchmarks.accuracy.approximation --data DATA --autocast

A finished cell is saved under ``--out`` and never computed again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.arguments import plain_parser, prepare
from benchmarks.harness.kept import figures_of, keep
from benchmarks.harness.report import mean_and_error, write_report
from benchmarks.study.checkpoints import add_study_arguments, checkpoint
from benchmarks.study.costs import Stopwatch, stored_bytes
from benchmarks.study.tasks import Task, add_task_arguments, label_of, load_task, settings_of
from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    LogitsModel,
    LowRankLoraLaplace,
)
from laplace_lora.evaluation.metrics import ece, nll
from laplace_lora.likelihoods.classification import LOGITS
from laplace_lora.likelihoods.links import Link
from laplace_lora.predictive.glm import Predictor

EXACT = "exact GGN"
REDUCE = {"backend_kwargs": {"kfac_approx": "reduce"}}
CORRECTED = {"eigenvalue_correction": True}
FIGURES = {  # of a cell: heading, digits
    "evidence": ("log evidence", 0),
    "gap": ("evidence gap", 0),
    "error": ("error", 3),
    "probit NLL": ("NLL, probit", 3),
    "probit ECE": ("ECE, probit", 3),
    "mc NLL": ("NLL, mc", 3),
    "mc ECE": ("ECE, mc", 3),
    "fit": ("fit, s", 1),
    "eigen": ("eigen s", 1),
    "predict": ("predict, s", 1),
    "MiB": ("MiB", 1),
}

EVALUATION_BATCH = 64
LINK_SAMPLES = 1000

Make = Callable[[LogitsModel], Any]


def structures() -> dict[str, Make]:
    """Return what makes each posterior, the cheap first."""

    def kron(**kwargs: Any) -> Make:
        return lambda model: KronLoraLaplace(model, "classification", **kwargs)

    def low_rank(rank: int) -> Make:
        return lambda model: LowRankLoraLaplace(model, "classification", rank=rank)

    low = {"low_rank_threshold": 64}  # of an encoder's sides none is longer than 512
    return {
        "diagonal": lambda model: DiagLoraLaplace(model, "classification"),
        "K-FAC expand, rank 10": kron(factor_rank=10, **low),
        "K-FAC expand, rank 64": kron(factor_rank=64, **low),
        "K-FAC expand, dense": kron(factor_rank=None),
        "K-FAC reduce, dense": kron(factor_rank=None, **REDUCE),
        "corrected, dense": kron(factor_rank=None, **CORRECTED),
        "low rank 32": low_rank(32),
        "low rank 128": low_rank(128),
        EXACT: lambda model: FullLoraLaplace(model, "classification"),
    }


def measured(task: Task, args: argparse.Namespace, la: Any) -> tuple[dict[str, float], Tensor]:
    """Fit, tune and evaluate a posterior; return its figures and its test covariances."""
    watch = Stopwatch(args.device)
    la.fit(task.loader("train", EVALUATION_BATCH))
    fit = watch.lap()
    la.optimize_prior_precision(correction=False)
    tune = watch.lap()
    figures = {"fit": fit, "evidence": float(la.log_marginal_likelihood())}
    figures["prior precision"] = float(la.prior_precision)
    figures["MiB"] = stored_bytes(la) / 2**20
    # Rows are decomposed when the evidence is first computed.
    figures["eigen"] = tune if isinstance(la, FullLoraLaplace) else 0.0
    watch.lap()
    parts = [la._glm_predictive_distribution(b) for b in task.loader("test", EVALUATION_BATCH)]
    figures["predict"] = watch.lap()
    mean, covariance = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    labels = torch.tensor([row["labels"] for row in task.splits["test"]])
    for link in ("probit", "mc"):
        p = linked(link, mean, covariance)
        figures |= {f"{link} NLL": nll(p, labels), f"{link} ECE": ece(p, labels)}
    return figures, covariance


def linked(link: str, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return class probabilities from moments, with the same samples for every structure."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(LINK_SAMPLES, mean.shape[1] - 1, generator=generator)
    return Link(link, noise).log_probabilities(mean, covariance).exp()


def exact_covariances(task: Task, exact: Any, precisions: list[float]) -> list[Tensor]:
    """Return the exact posterior's test covariances at several prior precisions, in one pass."""
    covariances: list[list[Tensor]] = [[] for _ in precisions]

    def variances(_: int, e: Tensor) -> Tensor:
        return 1 / (e.unsqueeze(1) + torch.tensor(precisions).to(e))

    for batch in task.loader("test", EVALUATION_BATCH):
        _, forms = Predictor(exact.fitted).forms(batch, LOGITS, variances)
        total = reduce(torch.add, (form for _, form in forms))
        for parts, covariance in zip(covariances, total.unbind(-1), strict=True):
            parts.append(covariance.cpu())
    return [torch.cat(parts) for parts in covariances]


def run_checkpoint(task: Task, args: argparse.Namespace, seed: int) -> None:
    """Measure all structures around one checkpoint, if that is still to be done."""
    path = cell_path(args, task.name, seed)
    if path.exists():
        return
    model = LogitsModel(checkpoint(task, args, seed)[0], task.target_ids)
    figures, covariances = {}, {}
    for name, make in structures().items():
        la = make(model)
        figures[name], covariances[name] = measured(task, args, la)
        print(f"{task.name}, seed {seed}: {name}", flush=True)
    # `la` is the exact posterior now, the last of all.
    deltas = [figures[name]["prior precision"] for name in figures]
    for name, reference in zip(figures, exact_covariances(task, la, deltas), strict=True):
        difference = covariances[name].double() - reference.double()
        figures[name]["error"] = float(difference.norm() / reference.double().norm())
        figures[name]["gap"] = figures[name]["evidence"] - figures[EXACT]["evidence"]
    keep(path, settings_for(args), figures)


def settings_for(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a checkpoint's figures depend on."""
    trained = {name: getattr(args, name) for name in ("epochs", "rate", "rank", "dropout")}
    return settings_of(args, ("train", "val", "test")) | trained


def cell_path(args: argparse.Namespace, task: str, seed: int) -> Path:
    """Return where a checkpoint's figures are saved."""
    return args.out / "approximation" / f"{task}-{seed}.json"


def finished(args: argparse.Namespace, task: str) -> dict[str, dict[str, dict[str, float]]]:
    """Return the figures of a task's checkpoints that have been measured, by their names."""
    paths = [cell_path(args, label_of(args, task), seed) for seed in args.seeds]
    return {path.stem: figures_of(path, settings_for(args)) for path in paths if path.exists()}


def table(cells: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a task's rows: mean and standard error over the seeds."""
    rows = []
    for name in cells[0]:
        row: dict[str, Any] = {"structure": name}
        for figure, (heading, digits) in FIGURES.items():
            row[heading] = mean_and_error([cell[name][figure] for cell in cells], digits)
        rows.append(row)
    return rows


def draw(args: argparse.Namespace, task: str, cells: list[dict[str, dict[str, float]]]) -> None:
    """Draw a task's errors against the seconds of fit and of prediction."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    kinds = {"diag": "#404040", "K-FAC": "#4878a8", "corr": "#d1605e", "low": "#6a9f58"}
    for axis, cost in zip(axes, ("fit", "predict"), strict=True):
        for name in cells[0]:
            x, y = (
                statistics.fmean(cell[name][value] for cell in cells) for value in (cost, "error")
            )
            if name == EXACT:
                axis.axvline(x, color="#999999", linestyle="--", label=EXACT)
                continue
            colour = next(c for kind, c in kinds.items() if name.startswith(kind))
            axis.plot(x, max(y, 1e-6), "o", color=colour)
            axis.annotate(
                name, (x, max(y, 1e-6)), xytext=(4, 3), textcoords="offset points", fontsize=7
            )
        most = max(cell[name][cost] for cell in cells for name in cell)
        axis.set(xlim=(0, 1.4 * most), yscale="log", xlabel=f"{cost}, seconds")  # room for names
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(fontsize=7, loc="lower left")
    axes[0].set_ylabel("relative error of the predictive covariance")
    figure.suptitle(f"{task}: error against cost, {len(cells)} checkpoints")
    figure.savefig(args.out / f"approximation-{task}.png", dpi=110)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = plain_parser(__doc__)
    add_task_arguments(parser, ["sst2", "cola", "trec6"])
    add_study_arguments(parser, seeds=[0, 1, 2])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    prepare(args)
    if not args.report:
        for seed in args.seeds:
            for name in args.tasks:
                run_checkpoint(load_task(args, name), args, seed)
    raw, tables = {}, {}
    for name in args.tasks:
        if cells := finished(args, name):
            raw |= cells
            tables[name] = table(list(cells.values()))
            draw(args, name, list(cells.values()))
    write_report("accuracy.approximation", args, tables, raw)


if __name__ == "__main__":
    main()
