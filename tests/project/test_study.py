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
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


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


def small_arguments(tmp_path, *extra):
    from benchmarks.harness.arguments import plain_parser
    from benchmarks.study.checkpoints import add_study_arguments
    from benchmarks.study.tasks import TASKS, add_task_arguments

    parser = plain_parser("")
    add_task_arguments(parser, TASKS)
    add_study_arguments(parser, [0])
    given = ["--data", str(tmp_path), *SMALL, "--out", str(tmp_path / "out"), *extra]
    return parser.parse_args(given)


def test_a_checkpoint_is_trained_once(benchmarks, tmp_path, capsys):
    from benchmarks.study.checkpoints import checkpoint, folder_of
    from benchmarks.study.tasks import load_task
    from transformers import BertForSequenceClassification

    save_model(BertForSequenceClassification, bert_config(), tmp_path)
    for file, seed in (("train", 0), ("dev", 1), ("dev_ood", 2)):
        write(tmp_path / "cola" / f"{file}.jsonl", sentences(60, seed))
    args = small_arguments(tmp_path, "--model", str(tmp_path / "model"))
    task = load_task(args, "cola")
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "val": 12,
        "train": 24,
        "test": 10,
        "shifted": 8,
    }
    assert task.evaluated == ["test", "shifted"]
    model, record = checkpoint(task, args, seed=1)
    weights = folder_of(task, args, 1) / "adapter_model.safetensors"
    written = weights.stat().st_mtime_ns
    again, same = checkpoint(task, args, seed=1)
    assert weights.stat().st_mtime_ns == written and same == record
    batch = next(iter(task.loader("test", 10)))
    batch.pop("labels")
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    other, _ = checkpoint(task, args, seed=2)
    assert not torch.equal(model(**batch).logits, other(**batch).logits)

    def with_other(*given):
        return small_arguments(tmp_path, "--model", str(tmp_path / "model"), *given)

    with pytest.raises(SystemExit, match="epochs 2, not 3"):
        checkpoint(task, with_other("--epochs", "3"), seed=1)
    held = with_other("--val-size", "20")  # as many rows to train on, some of them held out now
    with pytest.raises(SystemExit, match="training rows"):
        checkpoint(load_task(held, "cola"), held, seed=1)
    path = folder_of(task, args, 1) / "training.json"
    record.pop("training rows")  # as an earlier version wrote it
    path.write_text(json.dumps(record))
    capsys.readouterr()
    checkpoint(task, args, seed=1)
    assert "does not say its training rows" in capsys.readouterr().out


def test_answers_of_a_decoder_are_read(benchmarks, monkeypatch, tmp_path):
    from benchmarks.study import tasks
    from transformers import LlamaForCausalLM

    save_model(LlamaForCausalLM, llama_config(), tmp_path)
    monkeypatch.setattr(tasks, "LETTERS", "efgh")  # answers that the tiny tokenizer knows
    for file, seed in (("train", 0), ("test", 1)):
        write(tmp_path / "arc_easy" / f"{file}.jsonl", questions(60, seed))
    write(tmp_path / "arc_challenge" / "test.jsonl", questions(20, 3))
    task = tasks.load_task(
        small_arguments(tmp_path, "--model", str(tmp_path / "model")), "arc_easy"
    )
    assert task.classes == 4 and len(set(task.target_ids)) == 4
    assert {row["labels"] for row in task.splits["train"]} == {0, 1, 2, 3}
    assert len(tasks.read_questions(tmp_path / "arc_easy" / "test.jsonl")) == 59
    with pytest.raises(SystemExit, match="give one with --model"):
        tasks.load_task(small_arguments(tmp_path), "arc_easy")


def test_structures_are_compared_on_the_same_checkpoints(benchmarks, monkeypatch, capsys, tmp_path):
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
    monkeypatch.setattr(sys, "argv", [*argv, "--test-size", "5"])
    with pytest.raises(SystemExit, match="test_size 10, not 5"):
        approximation.main()
