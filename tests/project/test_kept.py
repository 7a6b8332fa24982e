"""Benchmarks keep their figures whole, with the settings that these were computed with."""

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    """What imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.fixture
def run(monkeypatch, tmp_path):
    """What runs a benchmark's command in a folder of its own."""

    def command(benchmark, *given):
        monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(tmp_path), *given])
        benchmark.main()

    return command


def test_figures_are_computed_once_for_their_settings(module, tmp_path, capsys):
    kept = module("harness.kept")
    path = tmp_path / "new" / "cell.json"
    figures, settings = {"NLL": 0.5}, {"rows": 8, "ranks": [2.0]}
    assert kept.kept(path, settings, lambda: figures) == figures
    assert kept.kept(path, settings, lambda: {"NLL": 0.7}) == figures
    with pytest.raises(SystemExit, match=r"cell\.json was computed with rows 8, not 16"):
        kept.kept(path, settings | {"rows": 16}, lambda: figures)
    assert not capsys.readouterr().out and list(path.parent.iterdir()) == [path]


def test_an_earlier_versions_figures_are_read_with_a_word(module, tmp_path, capsys):
    kept = module("harness.kept")
    path = tmp_path / "cell.json"
    path.write_text('{"NLL": 0.5}')
    assert kept.figures_of(path, {"rows": 8}) == {"NLL": 0.5}
    assert "cell.json does not say its rows: could not be checked" in capsys.readouterr().out


def test_files_are_whole_or_name_themselves(module, tmp_path):
    kept = module("harness.kept")
    path = tmp_path / "cell.json"
    kept.write(path, {"NLL": 0.5})
    with pytest.raises(KeyboardInterrupt), kept.replacing(path) as partial:
        partial.write_text('{"NLL": 0.')
        raise KeyboardInterrupt
    assert kept.read(path) == {"NLL": 0.5} and list(tmp_path.iterdir()) == [path]
    with kept.replacing(path) as one, kept.replacing(path) as other:
        assert one != other  # of two processes
        one.write_text("{}")
        other.write_text("{}")
    path.write_text('{"NLL": 0.')
    with pytest.raises(SystemExit, match=r"cell\.json is damaged"):
        kept.read(path)


def test_served_adapters_of_other_rows_are_refused(module, run, monkeypatch, tmp_path):
    serving = module("study.serving")
    way = {"NLL": 0.5, "ECE": 0.1, "accuracy": 0.9, "KL": 0.0}
    names = ("MAP", "GLM predictive", "its own width", "by labels", "by entropy")
    monkeypatch.setattr(
        serving, "figures_with", lambda args: lambda *given: dict.fromkeys(names, way)
    )
    folder = tmp_path / "checkpoints" / "encoder-trec6-long-0"
    folder.mkdir(parents=True)
    (folder / "training.json").write_text("{}")
    run(serving, "--data", ".", "--rows", "8")
    for other in (("--rows", "16"), ("--rows", "8", "--val-rows", "3"), ("--report",)):
        with pytest.raises(SystemExit, match="was computed with"):
            run(serving, "--data", ".", *other)


def test_tuners_of_other_sizes_are_refused(module, run, monkeypatch):
    tuners = module("study.tuners")
    nll = {"NLL": 0.5, "accuracy": 0.9}
    found = {name: {"test": nll} for name in ("MAP", "temperature scaling", *tuners.WAYS)}
    monkeypatch.setattr(tuners, "load_task", lambda args, task: None)
    monkeypatch.setattr(tuners, "figures", lambda *given: found)
    monkeypatch.setattr(tuners, "names", lambda: [(0, "trec6", "vera", "short")])
    monkeypatch.setattr(tuners, "write_report", lambda *given: None)  # no shifted rows, no table
    run(tuners, "--data", ".", "--train-size", "16")
    with pytest.raises(SystemExit, match="train_size 16, not 400"):
        run(tuners, "--data", ".")


def test_adaptive_ranks_of_other_sizes_are_refused(module, run, monkeypatch, tmp_path):
    ranks = module("adaptive.ranks")
    values = dict.fromkeys(ranks.METRICS, 0.5)
    monkeypatch.setattr(ranks, "load_task", lambda *given: None)
    monkeypatch.setattr(ranks, "lora_cells", lambda *given: {f"{ranks.LORA}, full": values})
    monkeypatch.setattr(ranks, "adalora_cell", lambda *given: values)
    (tmp_path / "cola").mkdir()
    given = ("--data", str(tmp_path), "--tasks", "cola", "--repeats", "1", "--no-times")
    run(ranks, *given, "--test-size", "8")
    with pytest.raises(SystemExit, match="test_size 8, not 300"):
        run(ranks, *given, "--test-size", "300")
    with pytest.raises(SystemExit, match="ranks"):
        run(ranks, *given, "--test-size", "8", "--ranks", "3")


def test_trainings_whose_names_begin_alike_are_told_apart(module):
    many = module("study.many_classes")
    found = {
        f"{length}-0": {
            way: {"NLL": nll, "accuracy": 0.5} for way in ("MAP", "temperature scaling", *many.WAYS)
        }
        for length, nll in {"early": 1.0, "long": 2.0, "longer": 10.0}.items()
    }
    rows = {row["training"]: row for row in many.rows_of(found) if row["way"] == "MAP"}
    assert [rows[length]["NLL"] for length in many.TRAININGS] == ["1.000", "2.000", "10.000"]
    assert {row["seeds"] for row in rows.values()} == {"1"}


def test_lengths_that_are_not_scored_are_refused(module, run, capsys):
    with pytest.raises(SystemExit):
        run(module("speed.generation"), "--scored", "100")
    assert "invalid choice: 100" in capsys.readouterr().err


def test_a_report_says_what_it_was_computed_with(module, tmp_path, capsys):
    report = module("harness.report")
    args = argparse.Namespace(out=tmp_path, device="cpu", threads=1)
    report.write_report("speed.none", args, {"Table": [{"a": 1}]}, {})
    machine = json.loads((tmp_path / "speed-none.json").read_text())["machine"]
    printed = capsys.readouterr().out
    for name in ("date", "torch", "transformers", "peft", "laplace_lora"):
        assert machine[name] in printed


def test_defaults_say_which_checkpoint_is_which(module, run, monkeypatch, tmp_path):
    defaults = module("study.defaults")
    columns = ("MAP", "temperature scaling", *defaults.WAYS, "best in hindsight")
    found = {"encoder-trec6-long-0": {"test": dict.fromkeys(columns, 0.5)}}
    monkeypatch.setattr(defaults, "over_checkpoints", lambda *given: found)
    run(defaults, "--data", ".")
    assert json.loads((tmp_path / "study-defaults.json").read_text())["raw"] == found
