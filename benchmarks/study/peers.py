"""Every method on the same checkpoints: class probabilities, computed once and kept.

Fixed before test rows were read: the methods and their settings below, those of
`benchmarks.study.trainings`, and the rows. Nothing is chosen on test rows. Methods without labels
see the training rows only; methods with labels see the first 50 or all 200 validation rows, with
which no checkpoint was trained. "Paper" is the setting of Yang et al. (2024, arXiv:2308.13111): a
zero prior mean and one precision by the plain evidence, probit link. TFB searches its width on the
training rows. "Ensemble" averages a cell's three trainings.

    python -m benchmarks.study.peers --data DATA --out OUT

Checkpoints that are not trained yet are left out. A method's probabilities are kept in ``peers``
beside each checkpoint, with the processor seconds of this process and the bytes it stores; what is
there is not computed again. Seconds to calibrate come on top of the fit's. `peer_tables` makes the
tables.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from benchmarks.harness.arguments import prepare
from benchmarks.harness.report import write_report
from benchmarks.study.judging import FIT_BATCH
from benchmarks.study.methods import Stopwatch, evaluated_splits, stored_bytes
from benchmarks.study.peer_tables import Cell, tables_of
from benchmarks.study.tasks import Task
from benchmarks.study.trainings import (
    EVALUATION_BATCH,
    Training,
    checkpoint_parser,
    in_order,
    load_checkpoint,
)
from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from laplace_lora.evaluation import MAP, MCDropout, TemperatureScaling, TrainingFreeBayes

FOLDER = "peers"
LABELS = "labels"
SAMPLES = 10


class Bench:
    """A checkpoint, and the posterior that several methods share on it.

    Args:
        task: Its data.
        model: The fine-tuned model.
    """

    def __init__(self, task: Task, model: LogitsModel) -> None:
        self.task, self.model = task, model

    @property
    def train(self) -> DataLoader:
        """The training rows, in the batches of a fit."""
        return self.task.loader("train", FIT_BATCH)

    def validation(self, labels: int) -> DataLoader:
        """Return the first validation rows."""
        rows = self.task.splits["val"][:labels]
        return DataLoader(rows, EVALUATION_BATCH, collate_fn=self.task.collate)

    def tuned(self, make: Callable[..., Any], **kwargs: Any) -> Any:
        """Return a posterior fitted to the training rows, its prior tuned by the default."""
        la = make(self.model, "classification", **kwargs)
        la.fit(self.train)
        la.optimize_prior_precision(train_loader=self.train)
        return la

    def kfac(self) -> Any:
        """Return the default posterior, fitted once, as it was tuned."""
        la, state = self._kfac
        la.state = state
        return la

    @cached_property
    def _kfac(self) -> tuple[Any, Any]:
        la = self.tuned(KronLoraLaplace)
        return la, la.state


def _paper(bench: Bench) -> Any:
    la = KronLoraLaplace(bench.model, "classification")
    la.fit(bench.train)
    la.optimize_prior_precision(method="marglik", correction=False)
    return la


def _calibrated(bench: Bench, labels: int) -> Any:
    la = bench.kfac()
    la.calibrate(bench.validation(labels))
    return la


def _scaled(bench: Bench, labels: int) -> TemperatureScaling:
    return TemperatureScaling(bench.model, bench.validation(labels))


METHODS: dict[str, Callable[[Bench], Any]] = {
    "MAP": lambda bench: MAP(bench.model),
    "temperature scaling, 50": lambda bench: _scaled(bench, 50),
    "temperature scaling, 200": lambda bench: _scaled(bench, 200),
    "K-FAC": Bench.kfac,
    "K-FAC calibrated, 50": lambda bench: _calibrated(bench, 50),
    "K-FAC calibrated, 200": lambda bench: _calibrated(bench, 200),
    "K-FAC, paper": _paper,
    "TFB": lambda bench: TrainingFreeBayes(bench.model, bench.train, n_samples=SAMPLES),
    "MC dropout": lambda bench: MCDropout(bench.model, SAMPLES),
    "last layer": lambda bench: bench.tuned(KronLoraLLLaplace),
    "diagonal": lambda bench: bench.tuned(DiagLoraLaplace),
    "exact": lambda bench: bench.tuned(FullLoraLaplace),
    "K-FAC, corrected": lambda bench: bench.tuned(KronLoraLaplace, eigenvalue_correction=True),
}
PROBIT = "K-FAC, paper"
ENSEMBLE = "ensemble"


def compute(training: Training, args: argparse.Namespace, names: list[str]) -> None:
    """Compute the methods of a checkpoint that are not there yet."""
    folder = args.out / "checkpoints" / training.name / FOLDER
    missing = [name for name in names if not _path(folder, name).exists()]
    if training.model == "decoder" and "last layer" in missing:
        missing.remove("last layer")  # its head is the base model's, and frozen
    if not missing:
        return
    folder.mkdir(exist_ok=True)
    task, model, _ = load_checkpoint(
        **vars(training), data=args.data, out=args.out, device=args.device
    )
    bench = Bench(task, LogitsModel(model, task.target_ids))
    splits = evaluated_splits(task)
    labels = {
        split: torch.tensor([row["labels"] for row in task.splits[split]]) for split in splits
    }
    save_file(labels, _path(folder, LABELS))
    for name in missing:
        watch = Stopwatch(args.device)
        method = METHODS[name](bench)
        fit = watch.lap()
        predict = partial(method, link_approx="probit") if name == PROBIT else method
        probs, seconds = {}, {}
        for split in splits:
            watch = Stopwatch(args.device)
            parts = [predict(batch) for batch in task.loader(split, EVALUATION_BATCH)]
            probs[split] = torch.cat(parts).detach().float().cpu().contiguous()
            seconds[split] = watch.lap()
        stored = 0 if isinstance(method, MAP) else stored_bytes(method)
        cost = {"fit": fit, "predict": seconds["test"], "bytes": stored}
        _path(folder, name).with_suffix(".json").write_text(json.dumps(cost))
        save_file(probs, _path(folder, name))
        print(f"{training.name}: {name}, {fit:.0f} s, {seconds['test']:.0f} s", flush=True)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Yield what is finished."""
    for training in in_order():
        folder = args.out / "checkpoints" / training.name / FOLDER
        if not training.name.startswith(args.only) or not _path(folder, LABELS).exists():
            continue
        labels = load_file(_path(folder, LABELS))
        for name in METHODS:
            if _path(folder, name).exists():
                cost = json.loads(_path(folder, name).with_suffix(".json").read_text())
                probs = load_file(_path(folder, name))
                yield Cell(training.name, name, labels, probs, cost)


def with_ensembles(found: list[Cell]) -> list[Cell]:
    """Return the cells and, where all seeds are there, the average of the seeds' MAPs.

    An ensemble has no seed; its probabilities stand beside every seed of its cell.
    """
    ensembles = []
    maps = [cell for cell in found if cell.method == "MAP"]
    for group in {cell.group for cell in maps}:
        members = [cell for cell in maps if cell.group == group]
        if len(members) < 3:
            continue
        probs = {
            split: torch.stack([member.probs[split] for member in members]).mean(0)
            for split in members[0].probs
        }
        cost = {"fit": 0.0, "predict": sum(member.cost["predict"] for member in members)}
        ensembles += [
            Cell(member.name, ENSEMBLE, member.labels, probs, {**member.cost, **cost})
            for member in members
        ]
    return [*found, *ensembles]


def _path(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(', ', '-').replace(' ', '-')}.safetensors"


def main() -> None:
    parser = checkpoint_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    args = parser.parse_args()
    prepare(args)
    if not args.report:
        for training in sorted(in_order(), key=lambda training: training.seed):
            trained = (args.out / "checkpoints" / training.name / "training.json").exists()
            if trained and training.name.startswith(args.only):
                compute(training, args, args.methods)
    tables, raw = tables_of(with_ensembles(list(cells(args))))
    write_report("study.peers", args, tables, raw)


if __name__ == "__main__":
    main()
