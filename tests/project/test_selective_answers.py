"""The example that writes answers, on a tiny random model."""

import math
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from support.examples import imported


@pytest.fixture
def example(monkeypatch):
    return imported("selective_answers", monkeypatch)


def tiny_decoder(example):
    rows = example.questions(example.XKCD_COLORS) + example.questions(example.CSS4_COLORS)
    texts = sorted({word for row in rows for text in row.values() for word in text.split()})
    words = {word: n for n, word in enumerate(["<pad>", "<end>", *texts])}
    tokens = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="<end>"
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = LlamaConfig(
        vocab_size=len(words), num_attention_heads=2, **sizes, pad_token_id=0, eos_token_id=1
    )
    return LlamaForCausalLM(config).eval(), tokenizer


def test_questions_and_labels(example):
    colours = {"xkcd:navy": "#01153e", "rosybrown": "#bc8f8f", "black": "#000000"}
    navy, rose = example.questions(colours)
    assert navy == {"prompt": "The colour called navy is", "answer": " dark blue"}
    assert rose["answer"] == " pale red"
    _, tokenizer = tiny_decoder(example)
    (row,) = example.encode([navy], tokenizer)
    assert row["labels"][:5] == [-100] * 5
    assert tokenizer.decode(row["labels"][5:]) == "dark blue <end>"


def test_auroc_and_accuracy(example):
    numbers = [(True, 0.1), (True, 0.4), (False, 0.3), (False, 0.9)]
    answers = [{"right": right, "x": x} for right, x in numbers]
    assert example.auroc(answers, "x") == pytest.approx(0.75)  # 3 of 4 pairs
    assert example.accuracy(answers) == 0.5
    assert math.isnan(example.auroc(answers[:2], "x"))  # none is wrong


@pytest.mark.slow
def test_it_runs(example, monkeypatch, capsys):
    monkeypatch.setattr(example.support, "load_decoder", lambda: tiny_decoder(example))
    monkeypatch.setattr(example, "LIMIT_ROWS", 8)
    options = {"--train-size": 32, "--epochs": 2, "--test-size": 20, "--seeds": 2}
    arguments = [str(part) for pair in options.items() for part in pair]
    monkeypatch.setattr(sys, "argv", ["selective_answers.py", *arguments, "--device", "cpu"])
    monkeypatch.setattr(example.support, "LEARNING_RATE", 0.1)
    example.main()
    written = capsys.readouterr().out
    assert "Questions: 20 of survey, 20 of web colours." in written
    figures = {
        line.split("|")[1].strip(): line.split("|")[2:-1]
        for line in written.splitlines()
        if "|" in line
    }
    assert {f"by {score}" for score in example.SCORES} <= set(figures)
    shares = [float(cell.split("±")[0]) for cell in figures["answered"][:2]]
    assert all(0 <= share < 1 for share in shares)
