"""Accuracy of low-rank factors: the predictive covariance against dense K-FAC, by factor rank.

The model is the quickstart's, fine-tuned on the quickstart's data or on ``--data``. With ``Σ_n``
the GLM predictive covariance ``(classes, classes)`` of the logits of test example n, the error of a
rank is the mean over n of ``‖Σ_n(rank) − Σ_n(dense)‖_F / ‖Σ_n(dense)‖_F``, at a fixed prior
precision. Only the factors differ: all posteriors share weights, training data and Jacobians.

Columns: *best* keeps the leading eigenpairs of the dense factors, *streamed* is what the library
fits without ever forming them. *zero* drops the directions left out, *isotropic* spreads the
missing trace over them. In all columns a side of width d stays dense if d is at most
``--low-rank-threshold``, or a sketch of ``2 rank + 10`` columns would not be smaller.

    python -m benchmarks.accuracy.rank
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import arguments
from benchmarks.harness.quickstart import add_quickstart_arguments, fine_tuned
from benchmarks.harness.report import verdict, write_report
from laplace_lora import KronLoraLaplace, LogitsModel, LowRankKronDecomposed
from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import RESIDUALS

DENSE = "dense"
AT_MOST = {10: 0.154, 32: 0.046, 64: 0.007}  # streamed, isotropic, by rank


def truncate(side: Eigen, rank: int, threshold: int, residual: str) -> Eigen:
    """Keep the leading eigenpairs of a side, unless the library would keep it dense.

    Args:
        side: Complete eigendecomposition.
        rank: Eigenpairs to keep.
        threshold: Sides up to this length stay dense.
        residual: ``"isotropic"`` or ``"zero"``, for the directions left out.
    """
    d = len(side.values)
    if d <= max(threshold, 2 * rank + 10):
        return side
    order = side.values.argsort(descending=True)
    leading, dropped = order[:rank], order[rank:]
    rest = side.values[dropped].mean()
    rest = rest if residual == "isotropic" else torch.zeros_like(rest)
    return Eigen(side.vectors[:, leading], side.values[leading], rest)


def posterior_precisions(
    model: LogitsModel, loader: DataLoader, args: argparse.Namespace
) -> tuple[Any, dict[str, LowRankKronDecomposed]]:
    """Fit every posterior of the table.

    Returns:
        A backend that makes Jacobians, and posterior precisions by column and rank.
    """

    def fit(factor_rank: int | None, residual: str = RESIDUALS[0]) -> KronLoraLaplace:
        la = KronLoraLaplace(
            model,
            "classification",
            factor_rank=factor_rank,
            low_rank_threshold=args.low_rank_threshold,
            residual=residual,
            prior_precision=args.prior_precision,
        )
        la.fit(loader)
        return la

    dense = fit(None)
    precisions = {DENSE: dense.posterior_precision}
    for rank in args.ranks:
        for residual in RESIDUALS:
            blocks = [
                [truncate(side, rank, args.low_rank_threshold, residual) for side in sides]
                for sides in dense.H.blocks
            ]
            best = LowRankKronDecomposed(blocks) * dense.fitted.scale + dense.prior_precision
            precisions[f"best, {residual}, {rank}"] = best
            streamed = fit(rank, residual).posterior_precision
            precisions[f"streamed, {residual}, {rank}"] = streamed
    return dense.backend, precisions


def relative_errors(
    backend: Any, precisions: dict[str, LowRankKronDecomposed], loader: DataLoader
) -> dict[str, float]:
    """Return the mean relative error over the test examples, by column and rank."""
    errors: dict[str, list[torch.Tensor]] = {name: [] for name in precisions if name != DENSE}
    for batch in loader:
        _, jacobians = backend.engine.jacobian_blocks(batch)
        covariances: dict[str, Any] = dict.fromkeys(precisions, 0.0)
        for i, jacobian in enumerate(jacobians):
            for name, precision in precisions.items():
                covariances[name] = covariances[name] + precision.inverse_form(i, jacobian)
        dense = covariances.pop(DENSE)
        for name, covariance in covariances.items():
            difference = torch.linalg.matrix_norm(covariance - dense)
            errors[name].append(difference / torch.linalg.matrix_norm(dense))
    return {name: torch.cat(values).mean().item() for name, values in errors.items()}


def table_rows(runs: list[dict[str, float]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Format the median over the fine-tunings, with the range where there are several."""
    rows = []
    for rank in args.ranks:
        row: dict[str, Any] = {"k": rank}
        for kind, residual in (
            ("best", "zero"),
            ("best", "isotropic"),
            ("streamed", "isotropic"),
            ("streamed", "zero"),
        ):
            column = f"{kind}, {residual}"
            values = [run[f"{column}, {rank}"] for run in runs]
            median = statistics.median(values)
            spread = f" ({min(values):.4f}-{max(values):.4f})" if len(values) > 1 else ""
            row[column] = f"{median:.4f}{spread}"
            if column == "streamed, isotropic" and rank in AT_MOST:
                row["at most"] = f"{AT_MOST[rank]}: {verdict(median, at_most=AT_MOST[rank])}"
        row["at most"] = row.get("at most", "-")  # the limit's column comes last
        rows.append({**row, "at most": row.pop("at most")})
    return rows


def main() -> None:
    parser = arguments.plain_parser(__doc__)
    arguments.add_run_arguments(parser, repeats=1, repeated="fine-tunings, each with its own seed")
    add_quickstart_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[10, 32, 64])
    parser.add_argument("--low-rank-threshold", type=int, default=64)
    parser.add_argument("--prior-precision", type=float, default=1.0)
    args = parser.parse_args()
    arguments.prepare(args)
    runs = []
    for seed in range(args.seed, args.seed + args.repeats):
        model, train_loader, test_loader = fine_tuned(args, seed)
        backend, precisions = posterior_precisions(model, train_loader, args)
        runs.append(relative_errors(backend, precisions, test_loader))
    tables = {"Relative error of the predictive covariance": table_rows(runs, args)}
    write_report("accuracy.rank", args, tables, runs)


if __name__ == "__main__":
    main()
