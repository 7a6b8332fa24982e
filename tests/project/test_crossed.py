"""The study's cross product judges posteriors as they judge themselves."""

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from laplace_lora import KronLoraLaplace, start_of
from support.batches import token_batch
from support.models import peft_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


def nll(la, task):
    batch = default_collate(task.splits["test"])
    return float(-la(batch).gather(1, batch["labels"].unsqueeze(1)).log().double().mean())


@pytest.mark.parametrize("structure", ["K-FAC", "exact"])
def test_figures_are_those_of_the_posteriors(monkeypatch, tmp_path, structure):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.study import crossed
    from benchmarks.study.held import held_jacobians
    from benchmarks.study.tasks import Task

    batch = token_batch([1 + n % 6 for n in range(40)])
    batch["labels"] %= 2
    model = peft_model("bert", dtype=torch.float64, num_labels=2)
    rows = [{key: value[n] for key, value in batch.items()} for n in range(40)]
    task = Task("tiny", "", 2, None, default_collate, {"train": rows[:24], "test": rows[24:]})
    start = peft_model("bert", dtype=torch.float64, num_labels=2)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    monkeypatch.setattr(crossed.Training, "load", lambda self, *given: (task, argparse.Namespace()))
    monkeypatch.setattr(crossed, "checkpoint", lambda task, args, seed: (model, {}))
    monkeypatch.setattr(crossed, "pretrained", lambda task, args, seed: start)
    training = crossed.Training("encoder", "tiny", "short", 0)
    with held_jacobians():
        found = crossed.figures(training, tmp_path, tmp_path, "cpu", structure)["test"]

    kind, options = crossed.STRUCTURES[structure]
    train = task.loader("train", 8)

    def tuned(modules=None, prior_mean=0.0, **kwargs):
        la = kind(model, "classification", modules=modules, prior_mean=prior_mean, **options)
        la.fit(train)
        la.optimize_prior_precision(train_loader=train, **kwargs)
        return la

    loo = tuned(method="loo")
    judged = {
        "paper | leave-one-out | by rule": loo,
        "B | leave-one-out | MAP": tuned("lora_B|classifier", method="loo", recentre=False),
        "matrices | plain evidence | MAP": tuned(
            method="marglik", correction=False, prior_structure="matrix"
        ),
        "start | evidence | MAP": tuned(prior_mean=start_of(start), method="marglik"),
    }
    for key, la in judged.items():
        assert found["ways"][key] == pytest.approx(nll(la, task), abs=1e-4), key
    loo.reset_mean()
    loo.recentre(float(loo.prior_precision), train_loader=train)
    assert found["ways"]["paper | leave-one-out | recentred"] == pytest.approx(
        nll(loo, task), abs=1e-4
    )
    loo.state = loo.state.with_settings(replace(loo.state.settings, shift=None))
    best = []
    for delta in crossed.GRID:
        loo.prior_precision = float(delta)
        best.append(nll(loo, task))
    assert found["hindsight"]["A and B"] == pytest.approx(min(best), abs=1e-4)
    tables = crossed.tables_of({structure: {"tiny-0": {"test": found}}})
    (table,) = tables.values()
    cells = {(row["prior"], row["tuning"]): row for row in table}
    for prior, tuning in itertools.product(("paper", "auto"), ("plain evidence", "evidence")):
        value = found["ways"][f"{prior} | {tuning} | MAP"]
        assert cells[prior, tuning]["MAP"] == f"{value:.3f} ({value - found['MAP']:+.3f})"
    assert issubclass(kind, KronLoraLaplace) == (structure == "K-FAC")
