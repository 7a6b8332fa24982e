"""The active-learning example on tiny settings: rows are labelled once, and curves averaged."""

import json
import sys

import pytest
import torch

from support.examples import imported
from support.models import bert_config
from support.texts import word_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture
def example(monkeypatch):
    return imported("active_learning", monkeypatch)


def test_curves_are_averaged_over_seeds(example):
    points = [[{"rows": 4.0, "accuracy": a, "NLL": 1.0}] for a in (0.5, 0.7)]
    (row,) = example.summary({"bald": points})
    assert row == {
        "method": "bald",
        "labelled": "4",
        "accuracy": "0.600 ± 0.100",
        "NLL": "1.000 ± 0.000",
    }


def test_each_round_labels_new_rows(example, monkeypatch, capsys, tmp_path):
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    BertForSequenceClassification(bert_config()).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    words = "abcdefgh"
    rows = [{"text": f"{words[i % 8]} {words[i // 8]}", "label": i % 2} for i in range(40)]
    lines = [json.dumps({**row, "text_pair": None}) for row in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    seen = []
    train = example.fitted
    monkeypatch.setattr(
        example,
        "fitted",
        lambda rows, *rest: seen.append([r["text"] for r in rows]) or train(rows, *rest),
    )
    options = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "rows.jsonl")]
    options += ["--start", "6", "--pool", "20", "--step", "4", "--rounds", "2", "--epochs", "1"]
    picture = tmp_path / "curves.png"
    options += ["--device", "cpu", "--picture", str(picture), "--methods", "random", "batchbald"]
    monkeypatch.setattr(sys, "argv", ["active_learning.py", *options])
    example.main()
    assert [len(texts) for texts in seen] == [6, 10, 14, 10, 14]
    assert all(len(set(texts)) == len(texts) for texts in seen)
    assert seen[2][:10] == seen[1] and seen[4][:10] == seen[3] and seen[1] != seen[3]
    printed = capsys.readouterr().out
    assert "| random" in printed and "| batchbald" in printed
    assert picture.stat().st_size > 5000
    monkeypatch.setattr(sys, "argv", ["active_learning.py", "--pool", "10", "--step", "9"])
    with pytest.raises(SystemExit):
        example.main()
