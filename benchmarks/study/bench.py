"""The methods of the comparison, each made from one checkpoint and its data.

Fixed before test rows were read: the methods and their settings, those of
`benchmarks.study.trainings`, and the rows. Nothing is chosen on test rows. Methods without labels
see the training rows only; methods with labels see the first 50, 200 or all 500 validation rows,
with which no checkpoint was trained. "Paper" is the setting of Yang et al. (2024,
arXiv:2308.13111), a zero prior mean and one precision by the plain evidence, with laplace-torch's
probit link; "paper, integral" has the link of the authors' code, which averages 100 000 samples of
the logits, as the default link integrates over them. "Evidence" has the gradient term and the
default link. TFB (Shi et al. 2024, arXiv:2412.05723) searches its width on the training rows, as
far as the tolerance of its authors' code lets it; "in its range" keeps to their range as well.
Which of its authors' rates BLoB has was chosen on the validation rows of one checkpoint, see
`blob`. "Paper, integral" and "TFB, in its range" came after test rows had been read; neither has
anything to choose.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.study.blob import BLoB
from benchmarks.study.judging import FIT_BATCH
from benchmarks.study.retrained import VariationalMean, with_more_labels
from benchmarks.study.tasks import Task
from benchmarks.study.trainings import EVALUATION_BATCH
from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LogitsModel,
)
from laplace_lora.evaluation import MAP, MCDropout, TemperatureScaling, TrainingFreeBayes

SAMPLES = 10
TFB_RANGE = (0.001, 0.015)  # of the authors' code (bayesian-peft, commit 7bdafeb)
ON_ACCELERATOR = 4  # times the batch of a CPU


class Bench:
    """A checkpoint, and the posterior that several methods share on it.

    Args:
        task: Its data.
        model: The fine-tuned model.
        args: How it was trained, and the device.
        seed: Of its training.
    """

    def __init__(self, task: Task, model: LogitsModel, args: argparse.Namespace, seed: int) -> None:
        self.task, self.model, self.args, self.seed = task, model, args, seed
        self._times = 1 if torch.device(args.device).type == "cpu" else ON_ACCELERATOR

    def loader(self, split: str) -> DataLoader:
        """Return a split's rows, in the batches of predictions."""
        return self.task.loader(split, EVALUATION_BATCH * self._times)

    @property
    def train(self) -> DataLoader:
        """The training rows, in the batches of a fit."""
        return self.task.loader("train", FIT_BATCH * self._times)

    def validation(self, labels: int) -> DataLoader:
        """Return the first validation rows."""
        rows = self.task.splits["val"][:labels]
        return DataLoader(rows, EVALUATION_BATCH * self._times, collate_fn=self.task.collate)

    def tuned(self, make: Callable[..., Any], **kwargs: Any) -> Any:
        """Return a posterior fitted to the training rows, its prior tuned by the default."""
        la = make(self.model, "classification", **kwargs)
        la.fit(self.train)
        la.optimize_prior_precision(train_loader=self.train)
        return la

    def kfac(self) -> Any:
        """Return the default posterior, fitted once, as it was tuned."""
        la, _, tuned = self._kfac
        la.state = tuned
        return la

    @cached_property
    def _kfac(self) -> tuple[Any, Any, Any]:
        """The posterior, and its states before and after tuning."""
        la = KronLoraLaplace(self.model, "classification")
        la.fit(self.train)
        before = la.state
        la.optimize_prior_precision(train_loader=self.train)
        return la, before, la.state

    def calibrated(self, labels: int) -> Any:
        """Return the default posterior, calibrated on some validation rows."""
        la = self.kfac()
        la.calibrate(self.validation(labels))
        return la

    def scaled(self, labels: int) -> TemperatureScaling:
        """Return temperature scaling with some validation rows."""
        return TemperatureScaling(self.model, self.validation(labels))

    def training_free(self, **kwargs: Any) -> TrainingFreeBayes:
        """Return TFB with its width searched on the training rows."""
        return TrainingFreeBayes(self.model, self.loader("train"), n_samples=SAMPLES, **kwargs)

    def by_evidence(self, correction: bool) -> Any:
        """Return the K-FAC posterior with one precision by the marginal likelihood."""
        la, before, _ = self._kfac
        la.state = before
        kwargs: dict[str, Any] = {"train_loader": self.train} if correction else {}
        la.optimize_prior_precision(method="marglik", correction=correction, **kwargs)
        return la


METHODS: dict[str, Callable[[Bench], Any]] = {
    "MAP": lambda bench: MAP(bench.model),
    "temperature scaling, 50": lambda bench: bench.scaled(50),
    "temperature scaling, 200": lambda bench: bench.scaled(200),
    "temperature scaling, 500": lambda bench: bench.scaled(500),
    "K-FAC": Bench.kfac,
    "K-FAC calibrated, 50": lambda bench: bench.calibrated(50),
    "K-FAC calibrated, 200": lambda bench: bench.calibrated(200),
    "K-FAC calibrated, 500": lambda bench: bench.calibrated(500),
    "K-FAC, paper": lambda bench: bench.by_evidence(correction=False),
    "K-FAC, paper, integral": lambda bench: bench.by_evidence(correction=False),
    "K-FAC, evidence": lambda bench: bench.by_evidence(correction=True),
    "exact": lambda bench: bench.tuned(FullLoraLaplace),
    "TFB": lambda bench: bench.training_free(),
    "TFB, in its range": lambda bench: bench.training_free(widths=TFB_RANGE),
    "IVON": lambda bench: VariationalMean(bench.task, bench.args, bench.seed, SAMPLES),
    "BLoB": lambda bench: BLoB(bench.task, bench.args, bench.seed, SAMPLES),
    "last layer": lambda bench: bench.tuned(KronLoraLLLaplace),
    "diagonal": lambda bench: bench.tuned(DiagLoraLaplace),
    "MC dropout": lambda bench: MCDropout(bench.model, SAMPLES),
    "MAP, 200 more rows": lambda bench: MAP(
        LogitsModel(
            with_more_labels(bench.task, bench.args, bench.seed, 200), bench.task.target_ids
        )
    ),
    "K-FAC, corrected": lambda bench: bench.tuned(KronLoraLaplace, eigenvalue_correction=True),
}
ON_KFAC = frozenset(  # their seconds come on top of K-FAC's
    name
    for name in METHODS
    if name.startswith(("K-FAC calibrated", "K-FAC, paper", "K-FAC, evidence"))
)
PROBIT = "K-FAC, paper"
ENCODER_ONLY = "last layer"  # a decoder's head is the base model's, and frozen
