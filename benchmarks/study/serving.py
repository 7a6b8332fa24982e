"""Serving: how well the averaged softmax of exported adapters stands in for the GLM predictive.

One K-FAC posterior per checkpoint of `benchmarks.study.trainings`, tuned by default. Its samples
are exported as adapters at three widths: the posterior's own, that of the best NLL on the
validation labels, and that at which the mean entropy is the GLM predictive's, on the validation
texts without labels. NLL, ECE and accuracy are of test rows; KL is the mean of the divergence from
the GLM predictive to the average of the softmaxes, in nats.

    python -m benchmarks.study.serving --data DATA --out OUT

Checkpoints that are not trained yet are left out. What is finished is kept in ``serving-K.json``
beside each checkpoint, and not computed again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.harness.arguments import prepare
from benchmarks.harness.report import mean_and_error, write_report
from benchmarks.study.judging import FIT_BATCH, fitted, over_checkpoints
from benchmarks.study.tasks import Task
from benchmarks.study.trainings import EVALUATION_BATCH, Training, checkpoint_parser
from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import MAP, evaluate
from laplace_lora.predictive.network_samples import NetworkSamples
from laplace_lora.predictive.weight_sampling import sampled_network

SHOWN = ("NLL", "ECE", "accuracy")


def rows_of(task: Task, split: str, count: int) -> list[dict[str, Any]]:
    """Return evenly spaced rows of a split, which is sorted by length."""
    rows = task.splits[split]
    places = torch.linspace(0, len(rows) - 1, min(count, len(rows))).long().tolist()
    return [rows[place] for place in places]


def tuned(
    training: Training, data: Path, out: Path, device: str
) -> tuple[Task, Any, KronLoraLaplace]:
    """Return a checkpoint's data, its model, and its posterior with a tuned prior."""
    task, logits, la = fitted(training, data, out, device)
    la.optimize_prior_precision(train_loader=task.loader("train", FIT_BATCH))
    return task, logits, la


def figures_with(args: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    """Return what computes the figures of one checkpoint."""

    def figures(training: Training, data: Path, out: Path, device: str) -> dict[str, Any]:
        task, logits, la = tuned(training, data, out, device)
        test, val = (
            DataLoader(rows_of(task, split, count), EVALUATION_BATCH, collate_fn=task.collate)
            for split, count in (("test", args.rows), ("val", args.val_rows))
        )
        unlabelled = [{k: v for k, v in batch.items() if k != "labels"} for batch in val]
        linearised = torch.cat([la(batch) for batch in test])
        found: dict[str, Any] = {"recentred": la.state.settings.shift is not None}
        found["MAP"] = scores(torch.cat([MAP(logits)(batch) for batch in test]), test, linearised)
        found["GLM predictive"] = scores(linearised, test, linearised)
        ways: dict[str, dict[str, Any]] = {
            "its own width": {"width": 1.0},
            "by labels": {"loader": val},
            "by entropy": {"loader": unlabelled},
        }
        samples = NetworkSamples(la.fitted, args.k, 0)
        for name, way in ways.items():
            with TemporaryDirectory() as folder:
                width = la.export_adapters(Path(folder) / "adapters", args.k, **way).width
            with sampled_network(la.fitted) as network:
                parts = [samples.probabilities(network, batch, width.width) for batch in test]
            found[name] = {"width": width.width, **scores(torch.cat(parts), test, linearised)}
        return found

    return figures


def scores(probs: Tensor, loader: DataLoader, linearised: Tensor) -> dict[str, float]:
    """Return the metrics of predictions, and their divergence from the GLM predictive."""
    labels = torch.cat([batch["labels"] for batch in loader])
    report = evaluate(lambda b: b["probs"], [{"probs": probs, "labels": labels}], bootstrap=2)
    p, q = linearised.double(), probs.double()
    divergence = (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(1).mean()
    return {**{name: report.values[name] for name in SHOWN}, "KL": float(divergence)}


def table(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return a line for each kind of checkpoint and way, the mean over seeds."""
    cells: dict[str, list[dict[str, Any]]] = {}
    for name, found in results.items():
        cells.setdefault(name.rpartition("-")[0], []).append(found)
    rows = []
    for cell, each in cells.items():
        for way in ("MAP", "GLM predictive", "its own width", "by labels", "by entropy"):
            row = {"checkpoint": cell, "seeds": str(len(each)), "way": way}
            widths = [found[way].get("width") for found in each]
            row["width"] = ", ".join("-" if w is None else f"{w:.2g}" for w in widths)
            for metric in (*SHOWN, "KL"):
                row[metric] = mean_and_error([found[way][metric] for found in each])
            rows.append(row)
    return rows


def main() -> None:
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--k", type=int, default=8, help="adapters")
    parser.add_argument("--rows", type=int, default=400, help="most test rows")
    parser.add_argument("--val-rows", type=int, default=200, help="most validation rows")
    args = parser.parse_args()
    prepare(args)
    settings = {"rows": args.rows, "val_rows": args.val_rows}
    results = over_checkpoints(args, figures_with(args), f"serving-{args.k}.json", settings)
    write_report("study.serving", args, {"Served adapters": table(results)}, results)


if __name__ == "__main__":
    main()
