"""Regression: prior and observation noise by leave-one-out, by the evidence, and for the MAP alone.

The quickstart's encoder learns a number from a text, briefly and for long: how far diabetes has
progressed, from scikit-learn's table written as sentences, and with ``--data`` whether a sentence
of SST-2 is positive (1) or not (-1), with noise of a deviation of 0.5 added, so that no model can
be better than an NLL of 0.726. A way is judged by the NLL of test rows under its Gaussian
predictions with their noise. "MAP" takes its noise from training residuals, "MAP, validation" from
rows of its own that no other way sees.

    python -m benchmarks.study.regressions --data DATA --out OUT

What is finished is kept in ``regressions`` in ``--out``, and not computed again.
"""

from __future__ import annotations

import random
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal
from torch.utils.data import DataLoader
from transformers import set_seed

from benchmarks.harness.arguments import prepare
from benchmarks.harness.kept import kept
from benchmarks.harness.report import mean_and_error, write_report
from benchmarks.study.small_trainings import figures_parser, split_loaders, train
from examples import support
from laplace_lora import FullLoraLaplace, KronLoraLaplace

EPOCHS = {"short": 8, "long": 20}
SEEDS = (1, 2, 3)
SIZES = {"train": 120, "val": 100, "test": 200}
RATE = 1e-3
MAX_TOKENS = 48
NOISE = 0.5  # of the sentiments
POSTERIORS = {"K-FAC": KronLoraLaplace, "exact": FullLoraLaplace}
WAYS = {"leave-one-out": "loo", "evidence": "marglik"}
CENTRAL = 0.9  # share of targets that an interval is meant for


def diabetes(_: Path | None) -> list[dict[str, Any]]:
    """Return scikit-learn's diabetes table as sentences, with standardised progressions."""
    from sklearn.datasets import load_diabetes

    table = load_diabetes(scaled=False)
    y = (table.target - table.target.mean()) / table.target.std()
    rows = []
    for values, label in zip(table.data, y, strict=True):
        named = zip(table.feature_names, values, strict=True)
        text = ", ".join(f"{name} {value:.4g}" for name, value in named)
        rows.append({"text": text, "text_pair": None, "label": float(label)})
    return rows


def sentiments(data: Path | None) -> list[dict[str, Any]]:
    """Return SST-2's sentences with noisy sentiments; none without the data."""
    if data is None:
        return []
    source = random.Random(0)
    rows = [row for _, row in support.json_lines(data / "sst2" / "train.jsonl.gz")]
    chosen = source.sample(rows, 1000)
    return [{**row, "label": 2 * row["label"] - 1 + source.gauss(0, NOISE)} for row in chosen]


TASKS = {"diabetes": diabetes, "sentiment": sentiments}


def figures(rows: list[dict[str, Any]], epochs: int, seed: int) -> dict[str, Any]:
    """Train a model; return what every way says of the test rows."""
    random.Random(seed).shuffle(rows)
    set_seed(seed)
    model, tokenizer = support.load_model(support.encoder_path(), 1, "cpu", lora_dropout=0.1)
    loaders = split_loaders(rows, SIZES, tokenizer, MAX_TOKENS)
    train(model, loaders["train"], epochs, RATE)
    found: dict[str, Any] = {}
    for name, cls in POSTERIORS.items():
        la = cls(model, "regression")
        la.fit(loaders["train"], progress_bar=False)
        if not found:
            for way, split in {"MAP": "train", "MAP, validation": "val"}.items():
                mean, _, y = predictions(la, loaders[split])
                noise = float((y - mean).square().mean().sqrt())
                mean, variance, y = predictions(la, loaders["test"])
                found[way] = judged(mean, 0 * variance, y, noise)
        for way, method in WAYS.items():
            started = time.process_time()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # it says that the evidence is wide
                la.optimize_prior_precision(
                    method=method, tune_sigma_noise=True, progress_bar=False
                )
            seconds = time.process_time() - started
            report = judged(*predictions(la, loaders["test"]), float(la.sigma_noise))
            found[f"{name}, {way}"] = {"seconds": seconds, "tuning": str(la.tuning), **report}
    return found


def predictions(la: Any, loader: DataLoader) -> tuple[Tensor, Tensor, Tensor]:
    """Return means, variances without noise, and targets, each ``(rows,)``."""
    means, variances, targets = [], [], []
    for batch in loader:
        mean, covariance = la(batch)
        means.append(mean.flatten().double())
        variances.append(covariance.flatten().double())
        targets.append(batch["labels"].double())
    return torch.cat(means), torch.cat(variances), torch.cat(targets)


def judged(mean: Tensor, variance: Tensor, y: Tensor, noise: float) -> dict[str, float]:
    """Return mean NLL in nats, share of targets inside of their intervals, error and noise."""
    predictive = Normal(mean, (variance + noise**2).sqrt())
    inside = (predictive.cdf(y) - 0.5).abs() < CENTRAL / 2
    return {
        "NLL": float(-predictive.log_prob(y).mean()),
        "inside": float(inside.double().mean()),
        "error": float((y - mean).square().mean().sqrt()),
        "noise": noise,
    }


def rows_of(found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Return a table of means over the seeds, with standard errors."""
    table = []
    for cell in dict.fromkeys(name.rpartition("-")[0] for name in found):
        results = [each for name, each in found.items() if name.rpartition("-")[0] == cell]
        for way in results[0]:
            row = {"task": cell, "seeds": str(len(results)), "way": way}
            for value, name in {
                "NLL": "test NLL",
                "inside": "inside of the 90 % intervals",
                "error": "root mean square error",
                "noise": "noise",
            }.items():
                row[name] = mean_and_error([each[way][value] for each in results])
            table.append(row)
    return table


def main() -> None:
    parser = figures_parser(__doc__, "diabetes-long")
    parser.add_argument("--data", type=Path, help="folder with the tasks' folders")
    args = parser.parse_args()
    prepare(args)
    folder, found = args.out / "regressions", {}
    for task, read in TASKS.items():
        rows = read(args.data)
        for length, epochs in EPOCHS.items() if rows else ():
            for seed in SEEDS:
                name = f"{task}-{length}-{seed}"
                path = folder / f"{name}.json"
                asked = not args.report and name.startswith(tuple(args.only))
                if asked or path.exists():
                    found[name] = kept(path, {}, partial(figures, list(rows), epochs, seed))
                    print(name, found[name], flush=True)
    write_report("study.regressions", args, {"Regressions": rows_of(found)}, found)


if __name__ == "__main__":
    main()
