"""Every prior with every way of tuning it, every mean and every structure, on the same checkpoints.

The rule, set before any of these figures was read: without validation labels, the lowest mean test
NLL over the checkpoints, none worse than the MAP by more than 0.005 nats. Crossed are

* priors: "paper" (A and B, mean zero, one precision), "matrices" (one precision each for all A, all
  B and the head), "start" (one precision around the start of training), "B" (`lora_B` and the head
  alone, mean zero), "auto" (around the start, ``prior_structure="auto"``);
* tuning: plain evidence, evidence with its gradient term, leave-one-out. The last takes a single
  precision and does not see the prior's mean, so that it is crossed with "paper" and "B";
* means: the MAP, the linearised model's mode under the precision that the same tuning gives a
  single-precision prior, and the mean that leave-one-out's rule chooses;
* structures: K-FAC, eigenvalue-corrected K-FAC, exact.

    python -m benchmarks.study.crossed --data DATA --out OUT

Beside them stands the best of a grid of precisions on the test rows. What is finished is kept
beside each checkpoint, and not computed again.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.arguments import prepare
from benchmarks.harness.report import write_report
from benchmarks.study.checkpoints import checkpoint, pretrained
from benchmarks.study.held import TestRows, held_jacobians
from benchmarks.study.judging import FIT_BATCH, over_checkpoints
from benchmarks.study.trainings import EVALUATION_BATCH, Training, checkpoint_parser, in_order
from laplace_lora import FullLoraLaplace, KronLoraLaplace, LogitsModel, start_of
from laplace_lora.data.distributed import ALONE
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.left_out.function_rows import FunctionRows
from laplace_lora.tuning.validation.cache import scoring_of

STRUCTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "K-FAC": (KronLoraLaplace, {}),
    "corrected K-FAC": (KronLoraLaplace, {"eigenvalue_correction": True}),
    "exact": (FullLoraLaplace, {}),
}
COVERED = {"A and B": None, "B": "lora_B|classifier"}
MEANS = ("MAP", "recentred", "by rule")
PLAIN, WITH_TERM, LOO = "plain evidence", "evidence", "leave-one-out"
GRID = torch.logspace(-2, 6, 33)
Way = tuple[str, str]  # prior and tuning


def figures(
    training: Training, data: Path, out: Path, device: str, structure: str
) -> dict[str, Any]:
    """Return the test NLL of every combination of a structure on one checkpoint, in nats."""
    task, how = training.load(data, out, device)
    start = start_of(pretrained(task, how, training.seed))
    model, _ = checkpoint(task, how, training.seed)
    logits = LogitsModel(model, task.target_ids)
    train = task.loader("train", FIT_BATCH)
    kind, options = STRUCTURES[structure]
    rows: TestRows | None = None
    found: dict[str, Any] = {"hindsight": {}, "ways": {}, "precisions": {}}
    for covered, modules in COVERED.items():
        la = kind(logits, "classification", modules=modules, **options)
        la.fit(train)
        rows = rows or TestRows(la, task.loader("test", EVALUATION_BATCH))
        tuned = _tuned(la, covered, start, train)
        shifts = _shifts(la, tuned, train)
        grid = [_at(la, float(delta)) for delta in GRID]
        covariances = rows.covariances(la, [*tuned.values(), *grid])
        for ((prior, way), settings), covariance in zip(tuned.items(), covariances, strict=False):
            for mean in MEANS:
                moved = rows.moved(la, shifts[mean, way])
                found["ways"][f"{prior} | {way} | {mean}"] = rows.nll(moved, covariance)
            precision = settings.prior_precision.double().log().mean().exp()
            found["precisions"][f"{prior} | {way}"] = float(precision)
        best = [rows.nll(rows.mean, each) for each in covariances[len(tuned) :]]
        found["hindsight"][covered] = min(best)
        found["MAP"] = rows.nll(rows.mean, torch.zeros_like(covariances[0]))
    return {"test": found}


def _at(la: Any, precision: float) -> Settings:
    """Return a posterior's settings as its fit left them, with a single prior precision."""
    settings: Settings = la.state.settings.untuned()
    return replace(settings, prior_precision=settings.prior_precision.new_tensor([precision]))


def _tuned(la: Any, covered: str, start: Any, train: Any) -> dict[Way, Settings]:
    """Return the settings of every prior and tuning that cover the same weights.

    Args:
        la: Fitted.
        covered: One of `COVERED`.
        start: The weights at the start of training.
        train: The training data.
    """
    fitted = la.state
    around = start.vector(la.logits_model.get_submodule("model"), la.params).to(la.mean)
    zero = fitted.settings.prior_mean
    priors = {"B": (zero, "scalar")}
    if covered != "B":
        priors = {"paper": (zero, "scalar"), "matrices": (zero, "matrix")}
        priors |= {"start": (around, "scalar"), "auto": (around, "auto")}
    tuned: dict[Way, Settings] = {}
    measured = fitted
    for prior, (mean, groups) in priors.items():
        settings = replace(fitted.settings, prior_mean=mean)
        for way, correction in ((PLAIN, False), (WITH_TERM, True)):
            la.state = measured.with_settings(settings)
            kwargs = {"train_loader": train} if correction else {}
            la.optimize_prior_precision(
                method="marglik", prior_structure=groups, correction=correction, **kwargs
            )
            tuned[prior, way], measured = la.state.settings, la.state
    la.state = fitted
    la.optimize_prior_precision(method="loo", train_loader=train)
    tuned[next(iter(priors)), LOO] = la.state.settings
    la.state = fitted
    return tuned


def _shifts(la: Any, tuned: dict[Way, Settings], train: Any) -> dict[Way, Tensor | None]:
    """Return how far each mean lies from the MAP, by mean and tuning."""
    posterior = la.fitted
    rows = FunctionRows(posterior, posterior.engine, scoring_of(posterior, "quadrature", 0).readout)
    labels = []
    for batch in train:
        x, y = posterior.split(batch)
        rows.add(x, y)
        labels.append(y)
    linear = rows.linear_model(torch.cat(labels), ALONE)
    shifts: dict[Way, Tensor | None] = {}
    single = {way: settings for (prior, way), settings in tuned.items() if prior in ("paper", "B")}
    for way, settings in single.items():
        mode = linear.mode(float(settings.prior_precision))
        shifts["MAP", way], shifts["by rule", way] = None, single[LOO].shift
        shifts["recentred", way] = rows.weights(mode, ALONE).to(posterior.mean)
    return shifts


def main() -> None:
    parser = checkpoint_parser(__doc__)
    parser.add_argument(
        "--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES)
    )
    args = parser.parse_args()
    prepare(args)
    found: dict[str, dict[str, Any]] = {structure: {} for structure in args.structures}
    for training in in_order():
        if not training.name.startswith(tuple(args.only)):
            continue
        one = argparse.Namespace(**{**vars(args), "only": [training.name]})
        with held_jacobians():
            for structure, results in found.items():
                measure = partial(figures, structure=structure)
                results |= over_checkpoints(one, measure, f"crossed-{structure}.json")
    write_report("study.crossed", args, tables_of(found), found)


def tables_of(found: dict[str, dict[str, dict[str, Any]]]) -> dict[str, list[dict[str, str]]]:
    """Return a table of mean NLL, and of the most above the MAP, for each structure.

    Args:
        found: Figures by structure and checkpoint.
    """
    tables = {}
    for structure, results in found.items():
        cells = {name: each["test"] for name, each in results.items()}
        if not cells:
            continue
        ways = dict.fromkeys(
            key.rpartition(" | ")[0] for each in cells.values() for key in each["ways"]
        )
        rows = [_row(way, list(cells.values())) for way in ways]
        best = {
            f"best in hindsight, {c}": [e["hindsight"][c] for e in cells.values()] for c in COVERED
        }
        for name, nll in {**best, "the MAP itself": [e["MAP"] for e in cells.values()]}.items():
            empty = dict.fromkeys(("tuning", *MEANS), "")
            rows.append({"prior": name, **empty, MEANS[0]: f"{statistics.fmean(nll):.3f}"})
        tables[f"{structure}, {len(cells)} checkpoints: {', '.join(cells)}"] = rows
    return tables


def _row(way: str, cells: list[dict[str, Any]]) -> dict[str, str]:
    """Return one line of a table: a prior and a tuning with every mean."""
    prior, _, tuning = way.partition(" | ")
    row = {"prior": prior, "tuning": tuning}
    for mean in MEANS:
        nll = [each["ways"][f"{way} | {mean}"] for each in cells]
        excess = max(value - each["MAP"] for value, each in zip(nll, cells, strict=True))
        row[mean] = f"{statistics.fmean(nll):.3f} ({excess:+.3f})"
    return row


if __name__ == "__main__":
    main()
