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

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.arguments import prepare
from benchmarks.harness.report import write_report
from benchmarks.study.checkpoints import checkpoint, pretrained
from benchmarks.study.judging import FIT_BATCH, over_checkpoints
from benchmarks.study.trainings import EVALUATION_BATCH, Training, checkpoint_parser
from laplace_lora import FullLoraLaplace, KronLoraLaplace, LogitsModel, start_of
from laplace_lora.data.distributed import ALONE
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.structures.base import Gram
from laplace_lora.structures.settings import Settings
from laplace_lora.structures.state import Posterior
from laplace_lora.tuning.function_rows import FunctionRows
from laplace_lora.tuning.validation_cache import scoring_of

STRUCTURES: dict[str, tuple[Any, dict[str, Any]]] = {
    "K-FAC": (KronLoraLaplace, {}),
    "corrected K-FAC": (KronLoraLaplace, {"eigenvalue_correction": True}),
    "exact": (FullLoraLaplace, {}),
}
COVERED = {"A and B": None, "B": "lora_B|classifier"}
MEANS = ("MAP", "recentred", "by rule")
PLAIN, WITH_TERM, LOO = "plain evidence", "evidence", "leave-one-out"
GRID = torch.logspace(-2, 6, 17)
Way = tuple[str, str]  # prior and tuning


class TestRows:
    """Functions of the test rows and their Jacobians, from one pass.

    Args:
        la: Fitted over all trainable tensors.
        loader: The rows.
    """

    __test__ = False

    def __init__(self, la: Any, loader: Any) -> None:
        posterior = la.fitted
        self.scoring = scoring_of(posterior, "quadrature", 0)
        self._products: tuple[Any, list[Gram]] | None = None
        self.names = posterior.names
        means, labels = [], []
        blocks: list[list[Tensor]] = [[] for _ in self.names]
        for batch in loader:
            x, y = posterior.split(batch)
            with evaluation_mode(posterior.model):
                f, jacobians = posterior.engine.jacobian_blocks(x, self.scoring.readout.columns)
                means.append(self.scoring.readout.mean(f).detach())
                for kept, block in zip(blocks, jacobians, strict=True):
                    kept.append(block.detach().flatten(2))
            labels.append(y)
        self.mean, self.y = torch.cat(means), torch.cat(labels)
        self.jacobians = {n: torch.cat(b) for n, b in zip(self.names, blocks, strict=True)}

    def covariance(self, la: Any, settings: Settings) -> Tensor:
        """Return the covariance of all rows under a posterior with other settings."""
        posterior = la.fitted.with_settings(settings)
        if posterior.structure.couples_groups and len(settings.prior_precision) == 1:
            return self._by_eigenvalues(posterior)  # many precisions from one product
        covariance: Tensor = posterior.precision.covariance(self._of(posterior.names))
        return covariance

    def _by_eigenvalues(self, posterior: Posterior) -> Tensor:
        curvature = posterior.state.curvature
        if self._products is None or self._products[0] is not curvature:
            blocks = posterior.precision.gram_blocks(self._of(posterior.names))
            self._products = curvature, [pair for _, pairs in blocks for pair in pairs]
        delta = posterior.settings.prior_precision
        return torch.stack([M @ (1 / (e + delta)).to(M) for e, M in self._products[1]]).sum(0)

    def moved(self, la: Any, shift: Tensor | None) -> Tensor:
        """Return the mean of all rows where the weights' mean is moved."""
        if shift is None:
            return self.mean
        parts = shift.split(la.fitted.engine.sizes)
        steps = [J @ part for J, part in zip(self._of(la.fitted.names), parts, strict=True)]
        return self.mean + torch.stack(steps).sum(0)

    def nll(self, mean: Tensor, covariance: Tensor) -> float:
        """Return the mean NLL in nats."""
        return float(self.scoring.nll(mean, covariance, self.y).double().mean())

    def _of(self, names: list[str]) -> Iterator[Tensor]:
        return (self.jacobians[name] for name in names)


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
        for (prior, way), settings in tuned.items():
            covariance = rows.covariance(la, settings)
            for mean in MEANS:
                moved = rows.moved(la, shifts[mean, way])
                found["ways"][f"{prior} | {way} | {mean}"] = rows.nll(moved, covariance)
            precision = settings.prior_precision.double().log().mean().exp()
            found["precisions"][f"{prior} | {way}"] = float(precision)
        grid = [rows.covariance(la, _at(la, float(delta))) for delta in GRID]
        found["hindsight"][covered] = min(rows.nll(rows.mean, each) for each in grid)
        found["MAP"] = rows.nll(rows.mean, torch.zeros_like(grid[0]))
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
    found = {
        structure: over_checkpoints(
            args, partial(figures, structure=structure), f"crossed-{structure}.json"
        )
        for structure in args.structures
    }
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
