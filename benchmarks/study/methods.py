"""Every method of the calibration study on one fine-tuned checkpoint, with its cost.

A method's probabilities on all splits are computed once; see `cells` for their evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.checkpoints import checkpoint, clock_for, folder_of
from benchmarks.study.tasks import Task
from laplace_lora import DiagLoraLaplace, KronLoraLaplace, KronLoraLLLaplace, LogitsModel
from laplace_lora.evaluation import MAP, LoraEnsemble, MCDropout, TemperatureScaling
from laplace_lora.likelihoods.links import Link

EVALUATION_BATCH = 64
LINK_SAMPLES = 1000
ENSEMBLE = "LoRA ensemble"


@dataclass(frozen=True)
class Outcome:
    """A method's probabilities, and their cost beyond the fine-tuned model.

    Attributes:
        probs: Class probabilities by split.
        fit: Seconds to fit and tune.
        predict: Seconds to predict the test split.
        memory: Bytes that the method stores.
        notes: Its hyperparameters.
    """

    probs: dict[str, Tensor]
    fit: float
    predict: float
    memory: int
    notes: dict[str, float]


class Stopwatch:
    """Seconds of an accelerator, or of this process alone on a shared processor."""

    def __init__(self, device: str) -> None:
        self._clock = clock_for(device)
        self._started = self._clock()

    def lap(self) -> float:
        """Return the seconds since the last lap, or since the start."""
        now = self._clock()
        seconds, self._started = now - self._started, now
        return seconds


def evaluated_splits(task: Task) -> list[str]:
    """Return the splits that methods are evaluated on, the test set first."""
    return [split for split in ("test", "shifted", "ood") if split in task.splits]


def outcomes(
    task: Task, args: argparse.Namespace, seed: int, known: set[str]
) -> Iterator[tuple[str, Outcome]]:
    """Yield every method that is not known yet, for one checkpoint.

    Args:
        task: The task.
        args: The study's arguments.
        seed: Of the checkpoint.
        known: Methods that need not be computed.
    """
    model, _ = checkpoint(task, args, seed)
    logits = LogitsModel(model, task.target_ids)
    plain: dict[str, Callable[[], MAP]] = {
        "MAP": lambda: MAP(logits),
        "temperature scaling": lambda: TemperatureScaling(logits, _loader(task, "val")),
        "MC dropout": lambda: MCDropout(logits, args.dropout_samples),
    }
    for name, make in plain.items():
        if name not in known:
            watch = Stopwatch(args.device)
            method = make()
            fit = watch.lap()
            yield name, _outcome(task, args, method, fit, 0, _numbers(method))
    for name, make_posterior in _posteriors(task, logits).items():
        links_of = {
            f"{name}, marginal likelihood": "probit",
            f"{name}, marginal likelihood, mc link": "mc",
        }
        calibrated = f"{name}, calibrated"
        wanted = [*links_of, *([calibrated] if name == "K-FAC" else [])]
        if known.issuperset(wanted):
            continue
        watch = Stopwatch(args.device)
        la = make_posterior()
        la.fit(task.loader("train", EVALUATION_BATCH))
        la.optimize_prior_precision()
        fit = watch.lap()
        notes = {"prior precision": float(la.prior_precision), "evidence": _evidence(la)}
        moments, predict = _moments(task, args, la)
        memory = stored_bytes(la)
        for method, link in links_of.items():
            probs = {split: linked(link, *pair) for split, pair in moments.items()}
            yield method, Outcome(probs, fit, predict, memory, notes)
        if calibrated in wanted:
            watch = Stopwatch(args.device)
            calibration = la.calibrate(_loader(task, "val"))
            fit += watch.lap()
            notes = {
                "prior precision": float(calibration.prior_precision),
                "covariance scale": calibration.covariance_scale,
                "temperature": calibration.likelihood_temperature,
            }
            moments, predict = _moments(task, args, la)
            probs = {split: linked("probit", *pair) for split, pair in moments.items()}
            yield calibrated, Outcome(probs, fit, predict, memory, notes)


def ensemble(task: Task, args: argparse.Namespace) -> Outcome:
    """Average the checkpoints of all seeds: one ensemble per task."""
    first, record = checkpoint(task, args, args.seeds[0])
    seconds = record["seconds"]
    for seed in args.seeds[1:]:
        _, record = checkpoint(task, args, seed)  # trains it where that is still to be done
        seconds += record["seconds"]
        first.load_adapter(str(folder_of(task, args, seed)), adapter_name=str(seed))
    members = LoraEnsemble(first, target_ids=task.target_ids)
    trained = sum(p.nbytes for p in first.parameters() if p.requires_grad)
    stored = trained * (len(args.seeds) - 1)
    return _outcome(task, args, members, seconds, stored, {"members": len(args.seeds)})


def _posteriors(task: Task, logits: LogitsModel) -> dict[str, Callable[[], Any]]:
    made: dict[str, Callable[[], Any]] = {
        "last layer": lambda: KronLoraLLLaplace(logits, "classification"),
        "diagonal": lambda: DiagLoraLaplace(logits, "classification"),
        "K-FAC": lambda: KronLoraLaplace(logits, "classification"),
    }
    if task.classes > 2:
        sampled = {"stochastic": True, "num_samples": 1}
        made["K-FAC, one sampled label"] = lambda: KronLoraLaplace(
            logits, "classification", backend_kwargs=sampled
        )
    if task.target_ids is not None:  # the adapter has no head of its own
        del made["last layer"]
    return made


def _outcome(
    task: Task,
    args: argparse.Namespace,
    method: Callable[[Any], Tensor],
    fit: float,
    memory: int,
    notes: dict[str, float],
) -> Outcome:
    probs, predict = {}, 0.0
    for split in evaluated_splits(task):
        watch = Stopwatch(args.device)
        probs[split] = torch.cat([method(batch).cpu() for batch in _loader(task, split)])
        predict = watch.lap() if split == "test" else predict
    return Outcome(probs, fit, predict, memory, notes)


def _moments(
    task: Task, args: argparse.Namespace, la: Any
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    moments, seconds = {}, 0.0
    for split in evaluated_splits(task):
        watch = Stopwatch(args.device)
        parts = [la._glm_predictive_distribution(batch) for batch in _loader(task, split)]
        seconds = watch.lap() if split == "test" else seconds
        mean, covariance = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
        moments[split] = mean, covariance
    return moments, seconds


def linked(link: str, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return class probabilities from moments, with the same samples for every method."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(LINK_SAMPLES, mean.shape[1] - 1, generator=generator)
    return Link(link, noise).log_probabilities(mean, covariance).exp()


def _loader(task: Task, split: str) -> Any:
    return task.loader(split, EVALUATION_BATCH)


def _numbers(method: MAP) -> dict[str, float]:
    settings = vars(method)
    return {name: settings[name] for name in ("temperature", "n_samples") if name in settings}


def _evidence(la: Any) -> float:
    return float(la.log_marginal_likelihood())


def stored_bytes(la: Any) -> int:
    """Return the bytes of a posterior's mean and curvature."""
    tensors, _ = la.structure.pack(la.fitted.state.curvature)
    return la.mean.nbytes + sum(tensor.nbytes for tensor in tensors.values())
