"""How many texts are cut is said, once."""

import pytest

from laplace_lora.commands.reading.adapter import HEAD, Adapter
from laplace_lora.commands.reading.columns import Columns
from laplace_lora.commands.reading.inputs import Inputs
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.said import cuts_said
from support.command_line import refused, run
from support.on_disk import reviews, tokenizer, write_json_lines

TEXTS = ["the film was good", "the film was", "the film was good good", "the"]


def inputs(likelihood="regression", columns=None, **plan):
    adapter = Adapter(None, tokenizer(), HEAD, 1, [], None, 24)
    return Inputs(adapter, Plan(likelihood, columns or Columns("text"), **plan))


@pytest.mark.parametrize(("limit", "count"), [(None, 0), (2, 3), (3, 2), (4, 1), (5, 0)])
def test_only_texts_that_lose_tokens_count(limit, count):
    rows, found = [{"text": text} for text in TEXTS], inputs(max_length=limit)
    examples = [found.text(row, n) for n, row in enumerate(rows, start=1)]
    verb = "is" if count == 1 else "are"
    said = f"{count} of 4 texts {verb} cut to {limit} tokens." if count else None
    assert cuts_said(found, examples, rows) == said


def test_both_texts_of_a_pair_count():
    rows = [{"chosen": TEXTS[2], "rejected": TEXTS[1]}, {"chosen": "the", "rejected": "a b c d e"}]
    pairs = inputs("reward_modeling", Columns(), max_length=4)
    examples = [pairs.preference(row, n) for n, row in enumerate(rows, start=1)]
    assert cuts_said(pairs, examples, rows) == "2 of 4 texts are cut to 4 tokens."


def test_commands_say_it(adapter, tmp_path):
    rows, folder = reviews(12, 0), adapter()
    rows[3]["text"] = rows[3]["text"] + " good" * 3
    path, said = write_json_lines(tmp_path / "a.jsonl", rows), "1 of 12 texts is cut to 6 tokens."
    args = (folder, "--data", path, "--max-length", 6)
    assert said in run("doctor", *args).stdout
    assert run("fit", *args, "--out", tmp_path / "p").stderr.count(said) == 1
    for command in ("predict", "evaluate"):
        asked = (command, *args[:3], "--posterior", tmp_path / "p")
        assert run(*asked).stderr.splitlines() == [said]
        assert run(*asked, "-q").stderr == ""
        assert run(*asked, "--max-length", 7).stderr == ""
    pair = {"chosen": "the " * 30 + "good", "rejected": "the " * 30 + "bad"}
    one = adapter("one output")
    path = write_json_lines(tmp_path / "pairs.jsonl", [pair])
    message = refused("fit", one, "--data", path)
    assert "row 1: its 'chosen' and 'rejected' texts differ only" in message
    assert "the model has positions for no more tokens" in message


@pytest.mark.slow
def test_commands_say_it_of_files_beside_the_data(adapter, tmp_path):
    rows, folder = reviews(12, 0), adapter()
    train = write_json_lines(tmp_path / "train.jsonl", rows)
    rows[3]["text"] = rows[3]["text"] + " good" * 3
    other, said = write_json_lines(tmp_path / "a.jsonl", rows), "1 of 12 texts of {} {} is cut to 6"
    args = (folder, "--data", train)
    fitted = run("fit", *args, "--max-length", 6, "--val", other).stderr
    assert fitted.count(said.format("--val", other)) == 1 == fitted.count("cut")
    for option in ("--ood", "--apart"):
        asked = ("evaluate", *args, option, other)
        assert run(*asked).stderr == said.format(option, other) + " tokens.\n"
        assert run(*asked, "-q").stderr == ""
