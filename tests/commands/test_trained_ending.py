"""A reward model that was trained on texts with the end-of-text token is read as it was trained."""

import json
import re

import pytest
import torch
from torch.nn import functional as F

from laplace_lora.commands.reading.adapter import load_adapter
from laplace_lora.commands.reading.plan import PLAN
from support.command_line import refused, run
from support.on_disk import preferences, reviews, write_json_lines

WARNING = "The adapter seems to have been trained with it: say --eos, or --no-eos"


@pytest.fixture
def pairs(tmp_path):
    return write_json_lines(tmp_path / "pairs.jsonl", preferences(40, 1))


def rewards(folder, texts):
    loaded = load_adapter(str(folder))
    with torch.no_grad():
        batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
        return loaded.model(**batch).logits.squeeze(1)


def losses(folder, end):
    chosen, rejected = (
        rewards(folder, [row[name] + end for row in preferences(40, 1)])
        for name in ("chosen", "rejected")
    )
    return -F.logsigmoid(chosen - rejected)


def test_a_fit_says_that_the_token_is_missing(adapter, pairs):
    folder = adapter("ended reward")
    args = ("fit", folder, "--data", pairs, "--overwrite")
    message = " ".join(run(*args).stderr.split())
    assert WARNING in message
    few = [i * 40 // 32 for i in range(32)]
    expected = [float(losses(folder, end)[few].mean()) for end in ("", "[EOS]")]
    shown = re.search(r"on 32 of the pairs is (\S+) nats, and (\S+) with .* '\[EOS\]'", message)
    assert [float(n) for n in shown.groups()] == pytest.approx(expected, rel=0.01)
    assert expected[0] > 10 * expected[1]
    assert WARNING in " ".join(run("doctor", *args[1:-1]).stderr.split())
    for option in ("--eos", "--no-eos"):
        assert WARNING not in " ".join(run(*args, option).stderr.split())


def test_a_fit_with_the_switch_and_all_that_follows_read_the_token(adapter, pairs, tmp_path):
    folder, rows = adapter("ended reward"), preferences(40, 1)
    shown = run("fit", folder, "--data", pairs, "--eos", "-q").stdout
    loss = float(re.search(r"mean training loss (\S+)", shown)[1])
    assert loss == pytest.approx(float(losses(folder, "[EOS]").mean()), rel=1e-3)
    assert json.loads((folder / PLAN).read_text())["eos"] is True
    args = ("predict", folder, "-q", "--data")
    found = [json.loads(line) for line in run(*args, pairs).stdout.splitlines()]
    assert min(row["probabilities"]["chosen"] for row in found) > 0.9
    assert run(*args, pairs, "--eos").stdout == run(*args, pairs).stdout
    assert run(*args, pairs, "--no-eos").stdout != run(*args, pairs).stdout
    single = write_json_lines(tmp_path / "x.jsonl", [{"text": r["chosen"]} for r in rows])
    found = [json.loads(line)["reward"] for line in run(*args, single).stdout.splitlines()]
    expected = rewards(folder, [row["chosen"] + "[EOS]" for row in rows])
    assert found == pytest.approx(expected.tolist(), abs=1e-4)


def test_nothing_is_said_of_an_adapter_that_was_trained_without_it(adapter, pairs, tmp_path):
    args = ("--data", pairs, "-q")
    assert run("fit", adapter("reward"), *args).stderr == ""
    ended = [{k: f"{text}[EOS]" for k, text in row.items()} for row in preferences(8, 1)]
    args = ("--data", write_json_lines(tmp_path / "ended.jsonl", ended), "-q")
    assert run("fit", adapter("ended reward"), *args).stderr == ""


def test_pairs_that_have_no_room_for_the_token_are_not_measured_with_it(adapter, tmp_path):
    """They differ in the last token that the model reads, and would be the same with it there."""
    long = {"chosen": "the " * 23 + "good", "rejected": "the " * 23 + "bad"}
    rows = [*preferences(20, 1), long]
    path = write_json_lines(tmp_path / "long.jsonl", rows)
    said = run("doctor", adapter("ended reward"), "--data", path)
    assert WARNING in said.stderr and "on 20 of the pairs" in said.stderr
    said = refused("doctor", adapter("reward"), "--data", path, "--eos")
    assert "row 21: its 'chosen' and 'rejected' texts differ only in what is cut off" in said


@pytest.mark.slow
def test_measuring_leaves_the_random_numbers_of_a_fit(adapter, pairs, tmp_path):
    folder = adapter("reward")
    shown = [
        run("fit", folder, "--data", pairs, "--out", tmp_path / "x", "--overwrite", "-q", *o).stdout
        for o in ((), ("--no-eos",))
    ]
    assert shown[0] == shown[1]


def test_a_reward_posterior_from_python_does_not_say_how_its_texts_end(posterior, pairs):
    folder = posterior("reward", pairs)
    args = ("predict", folder, "--data", pairs, "-q")
    expected = run(*args).stdout
    (folder / PLAN).unlink()
    assert "give --eos or --no-eos" in refused(*args)
    assert run(*args, "--no-eos").stdout == expected != run(*args, "--eos").stdout


@pytest.mark.slow
def test_whole_texts_of_a_language_model_end_where_it_is_said(adapter, data, tmp_path):
    folder, texts = adapter("decoder"), data("train", lambda row: {"text": row["text"]})
    assert run("fit", folder, "--data", texts, "-q").stderr == ""
    args = ("score", folder, "--data", texts, "--top-k", 4, "-q")

    def first(*options):
        return [
            t["text"] for t in json.loads(run(*args, *options).stdout.splitlines()[0])["tokens"]
        ]

    plain = [f" {word}" for word in reviews(1, 0)[0]["text"].split()[1:]]
    assert first() == plain and first("--eos") == [*plain, " [EOS]"]
    run("fit", folder, "--data", texts, "-q", "--eos", "--overwrite")
    assert first() == [*plain, " [EOS]"] and first("--no-eos") == plain
    prompts = write_json_lines(tmp_path / "prompts.jsonl", [{"text": "the film"}])
    run("generate", folder, "--data", prompts, "--max-new-tokens", 1, "--top-k", 4, "-q")


def test_the_switch_is_refused_by_commands_as_well(adapter, data):
    folder = adapter()
    for command in ("fit", "doctor"):
        message = refused(command, folder, "--data", data("train"), "--eos")
        assert "--eos: a classification posterior reads texts as the tokenizer" in message
    run("fit", folder, "--data", data("train"), "-q")
    message = refused("predict", folder, "--data", data("test"), "--no-eos")
    assert "--no-eos: a classification posterior" in message
    assert "No such option" in refused(
        "evaluate", folder, "--data", data("test"), "--eos", status=2
    )
