"""What judges posteriors on the study's checkpoints: moments of test rows and figures, kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness.kept import kept
from benchmarks.study.checkpoints import checkpoint
from benchmarks.study.tasks import Task
from benchmarks.study.trainings import EVALUATION_BATCH, Training, in_order
from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.evaluation import MAP
from laplace_lora.predictive.glm import Predictor
from laplace_lora.structures.posterior import Posterior
from laplace_lora.structures.settings import Settings
from laplace_lora.tuning.validation.cache import ValidationCache, scoring_of

UNIT = torch.ones(1)
FIT_BATCH = 8
Figures = Callable[[Training, Path, Path, str], dict[str, Any]]


def fitted(
    training: Training, data: Path, out: Path, device: str
) -> tuple[Task, LogitsModel, KronLoraLaplace]:
    """Return the data of a checkpoint, its model, and a K-FAC posterior over A, B and the head."""
    task, how = training.load(data, out, device)
    model, _ = checkpoint(task, how, training.seed)
    logits = LogitsModel(model, task.target_ids)
    la = KronLoraLaplace(logits, "classification")
    la.fit(task.loader("train", FIT_BATCH))
    return task, logits, la


def judged_splits(task: Task) -> dict[str, DataLoader]:
    """Return the rows that figures are of: test rows, and shifted ones where there are any."""
    names = [split for split in ("test", "shifted") if split in task.splits]
    return {split: task.loader(split, EVALUATION_BATCH) for split in names}


class Judge:
    """The NLL of labelled rows under any settings of a posterior, from one pass over the rows.

    Args:
        posterior: Fitted; its settings do not count.
        loader: The rows.
        shift: Where the mean is moved to, if some settings move it.
    """

    def __init__(self, posterior: Posterior, loader: Any, shift: torch.Tensor | None) -> None:
        still = replace(posterior.settings, prior_precision=UNIT, shift=None)
        self.scoring = scoring_of(posterior.with_settings(still), "quadrature", 0)
        groups = torch.zeros(len(posterior.names), dtype=torch.long)

        def cache(settings: Settings) -> ValidationCache:
            predictor = Predictor(posterior.with_settings(settings))
            return ValidationCache(predictor, loader, groups, self.scoring.readout)

        self.shift = shift
        self.kept = cache(still)
        self.moved = None if shift is None else cache(replace(still, shift=shift)).mean

    def nll(self, settings: Settings) -> float:
        """Return the mean NLL in nats under some settings with one prior precision."""
        mean, temperature = self.kept.mean, settings.likelihood_temperature
        if settings.shift is not None and self.shift is not None and self.moved is not None:
            step = float(settings.shift @ self.shift / self.shift.square().sum())
            mean = mean + step * (self.moved - mean)
        covariance = self.kept.covariance(mean.new_tensor([float(settings.prior_precision)]))
        covariance = covariance * (settings.covariance_scale / temperature**2)
        losses = self.scoring.nll(mean / temperature, covariance, self.kept.y)
        return float(losses.double().mean())


def nll_of(method: MAP, loader: Iterable[Any]) -> float:
    """Return a method's mean NLL of labelled rows, in nats."""
    losses = [
        -method(batch).double().log().gather(1, batch["labels"].unsqueeze(1)) for batch in loader
    ]
    return float(torch.cat(losses).mean())


def over_checkpoints(
    args: argparse.Namespace,
    figures: Figures,
    file: str,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
    """Return the figures of all trained checkpoints, by name; each is computed once.

    Args:
        args: ``data``, ``out``, ``device``, ``report`` and ``only``, how the names start.
        figures: From training, data, out and device to what is kept.
        file: Where it is kept, beside each checkpoint.
        settings: What the figures depend on beside the training.

    Raises:
        SystemExit: If figures were computed with other settings.
    """
    results = {}
    for training in sorted(in_order(), key=lambda training: training.seed):
        name = training.name
        folder = args.out / "checkpoints" / name
        path = folder / file
        trained = (folder / "training.json").exists()
        if not name.startswith(tuple(args.only)) or not (path.exists() or trained):
            continue
        if args.report and not path.exists():
            continue
        compute = partial(figures, training, args.data, args.out, args.device)
        results[name] = kept(path, settings, compute)
        print(name, results[name], flush=True)
    return results


def nll_tables(
    results: dict[str, dict[str, Any]],
    rows_of: Callable[[dict[str, list[dict[str, float]]]], list[dict[str, str]]],
) -> dict[str, list[dict[str, str]]]:
    """Return a table of the NLL for each split that has figures.

    Args:
        results: Figures of each checkpoint, by its name.
        rows_of: From the figures of a split, one entry a seed, by the checkpoints' names without
            seeds, to a table's rows.
    """
    tables = {}
    for split in ("test", "shifted"):
        cells: dict[str, list[dict[str, float]]] = {}
        for name, found in results.items():
            if split in found:
                cells.setdefault(name.rpartition("-")[0], []).append(found[split])
        if cells:  # TREC-6 has no shifted rows
            tables[f"{split.capitalize()} NLL"] = rows_of(cells)
    return tables
