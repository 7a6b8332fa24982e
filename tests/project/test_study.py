"""The calibration study end to end, on tiny random models and made-up data."""

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from support.models import bert_config, llama_config
from support.texts import word_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = [
    *("--train-size", "24", "--val-size", "12", "--test-size", "10", "--shifted-size", "8"),
    *("--epochs", "2", "--rank", "2", "--max-tokens", "30"),
]
WORDS = "abcdefgh"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.study import __main__ as study

    return study


def run(study, monkeypatch, capsys, tmp_path, *extra):
    out = tmp_path / "out"
    argv = ["study.py", "--data", str(tmp_path), "--model", str(tmp_path / "model"), *SMALL]
    monkeypatch.setattr(sys, "argv", [*argv, "--dropout-samples", "2", "--out", str(out), *extra])
    study.main()
    return out, json.loads((out / "study.json").read_text()), capsys.readouterr().out


def save_model(kind, config, tmp_path):
    torch.manual_seed(0)
    kind(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")


def sentences(n, seed):
    rng = random.Random(seed)
    texts = [[rng.choice(WORDS) for _ in range(rng.randint(2, 9))] for _ in range(n)]
    return [
        {"text": " ".join(words), "text_pair": None, "label": int(words[0] < "e")}
        for words in texts
    ]


def questions(n, seed):
    rng = random.Random(seed)
    return [
        {
            "question": " ".join(rng.choices(WORDS, k=4)),
            "choices": rng.choices(WORDS, k=4 if i else 5),  # the first is left out
            "answer": rng.randrange(4),
        }
        for i in range(n)
    ]


def test_classification_is_studied_and_resumed(study, monkeypatch, capsys, tmp_path):
    from transformers import BertForSequenceClassification

    save_model(BertForSequenceClassification, bert_config(), tmp_path)
    for file, seed in (("train", 0), ("dev", 1), ("dev_ood", 2)):
        write(tmp_path / "cola" / f"{file}.jsonl", sentences(60, seed))
    options = ("--tasks", "cola", "--seeds", "0", "1")
    out, report, printed = run(study, monkeypatch, capsys, tmp_path, *options)
    rows = {row["method"]: row for row in report["tables"]["cola"]}
    assert list(rows)[:4] == ["MAP", "temperature scaling", "MC dropout", "LoRA ensemble"]
    assert {"K-FAC, marginal likelihood", "K-FAC, calibrated"} <= set(rows)
    assert rows["MAP"]["seeds"] == 2 and rows["LoRA ensemble"]["seeds"] == 1
    assert all("±" in row["NLL"] and "±" in row["shifted NLL"] for row in rows.values())
    assert float(rows["LoRA ensemble"]["fit, epochs"]) > 1  # two trainings of two epochs each
    assert rows["MAP"]["MiB"] == "0.0" and rows["MAP"]["OOD AUROC"]
    assert (out / "reliability-cola.png").stat().st_size > 10_000
    assert "cola, seed 1: K-FAC, calibrated" in printed
    # A second run finds every cell finished.
    before = {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    _, again, printed = run(study, monkeypatch, capsys, tmp_path, *options)
    assert "seed" not in printed.split("## cola")[0].replace("--seeds", "")
    assert {path: path.stat().st_mtime_ns for path in (out / "cells").iterdir()} == before
    assert again["tables"] == report["tables"]
    with pytest.raises(SystemExit, match="other settings"):
        run(study, monkeypatch, capsys, tmp_path, *options, "--epochs", "3")


def test_answers_of_a_decoder_are_studied(study, monkeypatch, capsys, tmp_path):
    from transformers import LlamaForCausalLM

    save_model(LlamaForCausalLM, llama_config(), tmp_path)
    tasks = sys.modules["benchmarks.study.tasks"]
    monkeypatch.setattr(tasks, "LETTERS", "efgh")  # answers that the tiny tokenizer knows
    for file, seed in (("train", 0), ("test", 1)):
        write(tmp_path / "arc_easy" / f"{file}.jsonl", questions(60, seed))
    write(tmp_path / "arc_challenge" / "test.jsonl", questions(20, 3))
    options = ("--tasks", "arc_easy", "--seeds", "0", "1")
    _, report, _ = run(study, monkeypatch, capsys, tmp_path, *options)
    rows = {row["method"]: row for row in report["tables"]["arc_easy"]}
    assert {"MAP", "K-FAC, calibrated", "K-FAC, one sampled label, marginal likelihood"} <= set(
        rows
    )
    cells = report["raw"]["arc_easy"]["K-FAC, calibrated"]
    assert [cell["seed"] for cell in cells] == ["0", "1"]
    assert cells[0]["values"] != cells[1]["values"]
    assert tasks.read_questions(tmp_path / "arc_easy" / "test.jsonl")[0]["choices"][3:]
    assert len(tasks.read_questions(tmp_path / "arc_easy" / "test.jsonl")) == 59


def test_a_decoder_must_be_given(study, monkeypatch, capsys, tmp_path):
    (tmp_path / "arc_easy").mkdir()
    argv = ["study.py", "--data", str(tmp_path), "--tasks", "arc_easy", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="give one with --model"):
        study.main()


def test_structures_are_compared_on_the_same_checkpoints(study, monkeypatch, capsys, tmp_path):
    from benchmarks.accuracy import approximation
    from transformers import BertForSequenceClassification

    save_model(BertForSequenceClassification, bert_config(), tmp_path)
    for file, seed in (("train", 0), ("dev", 1), ("dev_ood", 2)):
        write(tmp_path / "cola" / f"{file}.jsonl", sentences(60, seed))
    out = tmp_path / "out"
    argv = ["approximation.py", "--data", str(tmp_path), "--model", str(tmp_path / "model")]
    argv += [*SMALL, "--tasks", "cola", "--seeds", "0", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    approximation.main()
    capsys.readouterr()
    report = json.loads((out / "accuracy-approximation.json").read_text())
    cells = report["raw"]["cola-0"]
    assert cells["exact GGN"]["error"] < 1e-3 and cells["exact GGN"]["gap"] == 0
    assert cells["low rank 128"]["error"] < 1e-3  # 24 rows only
    errors = {name: cell["error"] for name, cell in cells.items()}
    assert errors["K-FAC expand, dense"] > 1e-3 and errors["diagonal"] > 1e-3
    assert len(report["tables"]["cola"]) == len(cells)
    assert (out / "approximation-cola.png").stat().st_size > 10_000
