"""Active learning: which rows to label next, and whether asking for them beats taking any.

A model is fine-tuned on a few labelled rows, its posterior ranks the unlabelled pool, the best rows
are labelled, and the model is trained anew; beside each way of choosing stands a random choice,
from the same first rows and the same seeds. The default needs nothing but the installation: the
quickstart's encoder and its sentences about tumours. Or bring your own::

    python examples/active_learning.py --model path/to/model --data reviews.jsonl --seeds 5

with one JSON object per line, ``{"text": "...", "text_pair": null, "label": 0}``.

What active learning gains depends on the data, and is often less than the difference between two
seeds: read the standard errors, and take five seeds or more before believing a curve.
"""

from __future__ import annotations

import argparse
import random
import statistics
from pathlib import Path
from typing import Any

import support
from transformers import set_seed

from laplace_lora import KronLoraLaplace
from laplace_lora.evaluation import CalibrationReport, evaluate

METHODS = ("random", "entropy", "bald", "batchbald", "bait")
SHOWN = ("accuracy", "NLL")
Curve = list[dict[str, float]]


def fitted(rows: list[dict], args: argparse.Namespace, classes: int, seed: int) -> tuple[Any, Any]:
    """Fine-tune on the labelled rows; return a tuned posterior, and the tokenizer."""
    set_seed(seed)
    model, tokenizer = support.load_model(args.model, classes, args.device)
    loader = support.make_loader(rows, tokenizer, shuffle=True)
    support.train(model, loader, args.epochs, progress=None)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader)
    la.optimize_prior_precision()
    return la, tokenizer


def judged(la: Any, rows: list[dict], tokenizer: Any) -> CalibrationReport:
    """Evaluate a posterior on test rows."""
    return evaluate(la, support.make_loader(rows, tokenizer, 32), bootstrap=2)


def chosen(
    la: Any, pool: list[dict], args: argparse.Namespace, method: str, tokenizer: Any, seed: int
) -> list[int]:
    """Return the places in the pool that a method has labelled next."""
    if method == "random":
        return random.Random(seed).sample(range(len(pool)), args.step)
    texts = [
        row["text"] if row["text_pair"] is None else (row["text"], row["text_pair"]) for row in pool
    ]
    return la.acquire(texts, args.step, method, tokenizer).indices.tolist()


def curve(
    first: tuple[Any, Any],
    labelled: list[dict],
    pool: list[dict],
    test: list[dict],
    args: argparse.Namespace,
    classes: int,
    method: str,
    seed: int,
) -> Curve:
    """Return the test figures after each round of labelling."""
    labelled, pool = list(labelled), list(pool)
    la, tokenizer = first
    points = []
    for done in range(args.rounds + 1):
        report = judged(la, test, tokenizer)
        points.append({"rows": len(labelled), **{m: report[m] for m in SHOWN}})
        if done < args.rounds:
            taken = set(chosen(la, pool, args, method, tokenizer, seed + done))
            labelled += [row for i, row in enumerate(pool) if i in taken]
            pool = [row for i, row in enumerate(pool) if i not in taken]
            la, tokenizer = fitted(labelled, args, classes, seed)
    return points


def summary(curves: dict[str, list[Curve]]) -> list[dict[str, str]]:
    """Return a table: mean and standard error over the seeds after each round."""
    rows = []
    for method, found in curves.items():
        for points in zip(*found, strict=True):
            row = {"method": method, "labelled": str(int(points[0]["rows"]))}
            for metric in SHOWN:
                values = [point[metric] for point in points]
                row[metric] = f"{statistics.fmean(values):.3f}"
                if len(values) > 1:
                    error = statistics.stdev(values) / len(values) ** 0.5
                    row[metric] += f" ± {error:.3f}"
            rows.append(row)
    return rows


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draw the mean accuracy of each method against the rows labelled."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SHOWN), figsize=(9, 3.5), layout="constrained")
    for metric, ax in zip(SHOWN, axes, strict=True):
        for method, found in curves.items():
            sizes = [point["rows"] for point in found[0]]
            means = [
                statistics.fmean(p[metric] for p in points) for points in zip(*found, strict=True)
            ]
            style = {"color": "black", "linestyle": "--"} if method == "random" else {}
            ax.plot(sizes, means, marker="o", markersize=3, label=method, **style)
        ax.set_xlabel("labelled rows")
        ax.set_ylabel(f"test {metric}")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"Picture: {path}")


def main() -> None:
    parser = support.argument_parser(__doc__, "model", "data", "seed", "device")
    sizes = {"seeds": 1, "start": 20, "step": 20, "rounds": 3, "pool": 250, "epochs": 15}
    texts = {
        "seeds": "repetitions, from --seed on",
        "start": "rows that are labelled at first",
        "step": "rows that are labelled in a round",
        "rounds": "of labelling",
        "pool": "rows to choose from",
        "epochs": "passes over the labelled rows",
    }
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=support.count, default=value, help=texts[name])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="to compare")
    parser.add_argument("--picture", type=Path, help="where to draw the curves")
    args = parser.parse_args()
    args.train_size = args.start + args.pool
    if args.step * args.rounds > args.pool:
        parser.error(f"--pool {args.pool} is less than {args.rounds} rounds of {args.step} rows")
    curves: dict[str, list[Curve]] = {method: [] for method in args.methods}
    for seed in range(args.seed, args.seed + args.seeds):
        split = argparse.Namespace(**{**vars(args), "seed": seed})
        rows, held_out, names = support.read_split(parser, split)
        labelled, pool = rows[: args.start], rows[args.start :]
        test = held_out[: support.MAX_TEST]
        first = fitted(labelled, args, len(names), seed)
        for method in args.methods:
            options = (labelled, pool, test, args, len(names), method, seed)
            curves[method].append(curve(first, *options))
            last = curves[method][-1][-1]
            print(f"seed {seed}, {method}: accuracy {last['accuracy']:.3f}, NLL {last['NLL']:.3f}")
    print("\n" + support.table(summary(curves)))
    if args.picture is not None:
        draw(curves, args.picture)


if __name__ == "__main__":
    main()
