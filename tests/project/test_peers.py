"""The comparison of methods: what it computes once, and its tables by hand."""

import argparse
import importlib
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from support.batches import token_batch
from support.models import peft_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.study import peers

    return peers


def cell(peers, name, method, right, labels=(0, 0, 1, 1), predict=1.0):
    """A method that gives the true class a probability, one for each row."""
    y, right = torch.tensor(labels), torch.tensor(right)
    p = torch.stack([torch.where(y == 0, right, 1 - right), torch.where(y == 1, right, 1 - right)])
    cost = {"fit": 3.0, "predict": predict, "bytes": 2**20}
    return peers.Cell(name, method, {"test": y}, {"test": p.T}, cost)


def test_tables_by_hand(peers):
    cells = []
    for seed, loss in enumerate((0.5, 0.52, 0.48)):
        cells.append(
            cell(peers, f"encoder-easy-{seed}", "MAP", [loss] * 4 + [0.9], (0, 0, 1, 1, 1))
        )
        cells.append(cell(peers, f"encoder-easy-{seed}", "ours", [0.9] * 5, (0, 0, 1, 1, 1), 2.5))
        cells.append(cell(peers, f"encoder-hard-{seed}", "MAP", [0.4] * 4))
        cells.append(cell(peers, f"encoder-hard-{seed}", "ours", [0.3] * 4))
    tables, raw = peers.tables_of(cells)
    wins = {
        row[""]: row
        for row in tables["Wins: cells with a lower test NLL by more than two standard errors"]
    }
    assert wins["ours"]["MAP"] == "1 of 2" and wins["MAP"]["ours"] == "1 of 2"
    groups = {row["checkpoints"]: row for row in tables["Test NLL"]}
    assert set(groups) == {
        "encoder-easy",
        "encoder-hard*",
    }  # nobody beats the majority class on the hard task
    assert groups["encoder-hard*"]["ours"] == f"{-math.log(0.3):.3f} ± 0.000"
    means = {
        row["method"]: row for row in tables["Means over checkpoints that have learnt, encoder"]
    }
    assert means["ours"]["checkpoints"] == "3"
    assert means["ours"]["NLL"] == f"{-math.log(0.9):.3f}"
    losses = tables["Test NLL minus the MAP's"][-1]
    assert losses["ours"] == f"{math.log(0.4 / 0.3):+.3f}"
    costs = {
        row["method"]: row
        for row in tables["Cost, in units of the MAP's predictions of the test rows"]
    }
    assert costs["ours"]["predict"] == "1.8" and costs["MAP"] == {
        "method": "MAP",
        "fit": "3.0",
        "predict": "1.0",
        "MiB": "1.0",
    }
    assert len(raw) == len(cells) and "shifted NLL" not in raw[0]["values"]


def test_wins_are_larger_than_rounding(peers):
    """By 0.0004 nats on each of three trainings, and by far on two."""
    cells = []
    for seed in range(3):
        cells.append(cell(peers, f"encoder-near-{seed}", "MAP", [0.9] * 4))
        cells.append(cell(peers, f"encoder-near-{seed}", "ours", [0.9 * math.exp(4e-4)] * 4))
    for seed in range(2):
        cells.append(cell(peers, f"encoder-few-{seed}", "MAP", [0.6] * 4))
        cells.append(cell(peers, f"encoder-few-{seed}", "ours", [0.9] * 4))
    tables, _ = peers.tables_of(cells)
    rows = tables["Wins: cells with a lower test NLL by more than two standard errors"]
    assert {row[""]: row for row in rows}["ours"]["MAP"] == "0 of 1"


@pytest.mark.parametrize("names", [["K-FAC, evidence"], ["K-FAC calibrated, 50", "K-FAC"]])
def test_costs_do_not_depend_on_earlier_runs(peers, monkeypatch, tmp_path, names):
    """What shares K-FAC's fit is timed without it; K-FAC itself with it."""
    happened = []

    class Bench:
        args = argparse.Namespace(device="cpu")
        task = argparse.Namespace(
            evaluated=["test"], splits={"test": [{"labels": 0}]}, target_ids=None
        )

        def __init__(self, *given):
            self.made = False

        def kfac(self):
            if not self.made:
                happened.append("fit")
                self.made = True
            return lambda batch: torch.ones(1, 1)

        def loader(self, split):
            return [None]

    class Watch:
        def __init__(self, device):
            happened.append("watch")

        def lap(self):
            return 0.0

    monkeypatch.setattr(peers, "Bench", Bench)
    monkeypatch.setattr(peers, "Stopwatch", Watch)
    monkeypatch.setattr(peers, "_stored", lambda method: 0)
    monkeypatch.setattr(peers, "checkpoint", lambda *given: (None, {}))
    monkeypatch.setattr(peers, "LogitsModel", lambda *given: None)
    monkeypatch.setattr(peers.Training, "load", lambda *given: (Bench.task, Bench.args))

    def method(name):
        return lambda bench: happened.append(name) or bench.kfac()

    monkeypatch.setattr(peers, "METHODS", {name: method(name) for name in peers.METHODS})
    args = argparse.Namespace(out=tmp_path, data=tmp_path, device="cpu", workers=1)
    (tmp_path / "checkpoints" / "encoder-sst2-short-0").mkdir(parents=True)
    assert peers.compute(peers.Training("encoder", "sst2", "short", 0), args, names) == []
    first = ["watch", "K-FAC", "fit"] if "K-FAC" in names else ["fit", "watch", *names]
    assert happened[:3] == first


def test_an_ensemble_averages_its_members(peers):
    """Three seeds of a decoder; two more of an encoder, which stand in no table themselves."""
    for model, rights in (("decoder", (0.2, 0.4, 0.9)), ("encoder", (0.2, 0.4, 0.9, 0.1, 0.9))):
        cells = [
            cell(peers, f"{model}-easy-{seed}", "MAP", [p] * 4) for seed, p in enumerate(rights)
        ]
        assert len(peers.with_ensembles(cells[:2])) == 2
        assert len(peers.with_ensembles(cells[:-1])) == min(len(cells) - 1, 3)
        found = peers.with_ensembles(cells)
        assert found[:3] == cells[:3]
        assert [each.name for each in found[3:]] == [each.name for each in cells[:3]]
        assert found[3].values["NLL"] == pytest.approx(-math.log(0.5))
        assert found[3].cost["predict"] == len(rights)


def test_ensembles_have_further_members(peers):
    cells = [peers.Training("encoder", "sst2", "long", seed) for seed in (0, 1)]
    further = peers.further_members([*cells, peers.Training("decoder", "sst2", "long", 0)])
    assert [each.name for each in further] == ["encoder-sst2-long-3", "encoder-sst2-long-4"]


@pytest.mark.filterwarnings("ignore:the posterior's mean is moved")  # as little is learnt
def test_methods_are_computed_once(peers, monkeypatch, tmp_path, capsys):
    from benchmarks.study.bench import METHODS
    from benchmarks.study.tasks import Task

    # Of 40 rows no gain by a width is clear, and posteriors without any would be alike.
    monkeypatch.setattr("laplace_lora.tuning.left_out.width_choice.CLEAR", -100.0)
    batch = token_batch([1 + n % 6 for n in range(240)])
    model = peft_model("bert")
    learnt = torch.arange(240) % 3 > 0
    batch["labels"][learnt] = peers.MAP(model).logits(batch)[learnt].argmax(-1)
    rows = [{key: value[n] for key, value in batch.items()} for n in range(240)]
    splits = {"train": rows[:40], "val": rows, "test": rows[:3], "shifted": rows[2:8]}
    task = Task("tiny", "", 3, None, default_collate, splits)
    training = peers.Training("encoder", "trec6", "short", 0)
    monkeypatch.setattr(peers, "in_order", lambda: [training])
    how = argparse.Namespace(device="cpu", rate=1e-3, epochs=1, autocast=False)
    monkeypatch.setattr(peers.Training, "load", lambda self, data, out, device: (task, how))
    monkeypatch.setattr(peers, "checkpoint", lambda task, args, seed: (model, {}))
    for place in ("retrained", "checkpoints"):
        module = importlib.import_module(f"benchmarks.study.{place}")
        monkeypatch.setattr(module, "pretrained", lambda task, args, seed: peft_model("bert"))
    args = argparse.Namespace(out=tmp_path, data=tmp_path, device="cpu", only=[""], workers=1)
    folder = tmp_path / "checkpoints" / training.name
    folder.mkdir(parents=True)
    names = list(METHODS)
    assert peers.compute(training, args, names) == []
    assert len(capsys.readouterr().out.splitlines()) == len(names)
    found = {each.method: each for each in peers.cells(args)}
    assert list(found) == names
    for each in found.values():
        assert each.probs["test"].shape == (3, 3) and each.probs["shifted"].shape == (6, 3)
    shifted = {name: each.probs["shifted"] for name, each in found.items()}
    for one, other in itertools.combinations(names, 2):  # none is another by a different name
        assert (shifted[one] - shifted[other]).abs().max() > 1e-6, (one, other)
    peers.compute(training, args, names)
    assert not capsys.readouterr().out
