"""A prompt is not taken for the whole text where what follows it is under another name."""

import json

import pytest

from laplace_lora.commands.reading.columns import Columns, columns_of
from laplace_lora.commands.reading.completions import completion_column
from support.command_line import refused, run
from support.on_disk import reviews, write_json_lines

TEXTS, PAIRS = "language_modeling", "reward_modeling"
ASKED = Columns(text="prompt", completion="completion")


def found(row, likelihood=TEXTS, known=None, asked=Columns(), **needed):  # noqa: B008
    columns = columns_of([row], asked, known)
    return completion_column([row], columns, asked, likelihood, known, **needed)


def parts(row):
    *words, last = row["text"].split()
    return " ".join(words), f" {last}"


def test_the_fit_s_column_comes_before_another_that_is_the_only_one():
    for name in ("completion", "answer", "response"):
        assert found({"prompt": "a", name: "b"}) == name
        assert found({"prompt": "a", name: "b"}, known=ASKED) == name
        assert found({"prompt": "a", name: "b"}, PAIRS, Columns("prompt")) == name
    several = {"prompt": "a", "answer": "b", "response": "c"}
    assert found({**several, "completion": "d"}, known=ASKED) == "completion"
    assert found(several, known=Columns("prompt", completion="response")) == "response"
    assert found({**several, "own": "d"}, known=ASKED, asked=Columns(completion="own")) == "own"


def test_whole_texts_of_a_fit_are_whole_beside_any_column():
    for text in ("text", "messages", "prompt", "response"):
        assert found({text: "a", "answer": "b"}, known=Columns(text)) is None
        named = Columns(completion="answer")
        assert found({text: "a", "answer": "b"}, known=Columns(text), asked=named) == "answer"
    other = {"text": "a", "prompt": "b", "answer": "c"}  # is read as in a fit
    assert found(other, known=Columns("text"), asked=Columns("prompt")) == "answer"
    assert found(other, known=Columns("prompt"), asked=Columns("text")) is None


@pytest.mark.parametrize("text", ["text", "sentence", "messages"])
def test_whether_texts_are_whole_is_said_where_it_is_not_clear(text):
    row = {text: "a", "answer": "b"}
    for likelihood, known in ((TEXTS, None), (PAIRS, Columns())):
        with pytest.raises(ValueError, match=rf"'{text}' may .* --text-field {text} for whole"):
            found(row, likelihood, known)
        assert found(row, likelihood, known, Columns(text)) is None
        assert found(row, likelihood, known, Columns(completion="answer")) == "answer"
        assert found(row, likelihood, known, is_needed=False) is None
    assert found({"question": "a", "answer": "b"}) == "answer"
    assert found({text: "a"}) is None


@pytest.mark.parametrize("names", [("output",), ("answer", "response"), ()])
def test_what_follows_a_prompt_must_be_clear(names):
    row = {"prompt": "a", **dict.fromkeys(names, "b")}
    for likelihood, known in ((TEXTS, ASKED), (PAIRS, Columns("prompt"))):
        with pytest.raises(ValueError, match="which column follows 'prompt' is not clear"):
            found(row, likelihood, known)
        assert found(row, likelihood, known, is_needed=False) is None
    plain = {"body": "a", "prompt": "b"}
    assert found(plain, known=ASKED, asked=Columns("body")) is None  # of whole texts


def test_what_follows_a_new_prompt_must_be_clear_as_well():
    for text in ("prompt", "question"):
        with pytest.raises(ValueError, match=f"the column '{text}' may be followed by one of 'out"):
            found({text: "a", "output": "b"})
        assert found({text: "a", "output": "b"}, asked=Columns(text)) is None
        assert found({text: "a", "output": "b"}, asked=Columns(completion="output")) == "output"
        assert found({text: "a", "output": "b"}, is_needed=False) is None
        assert found({text: "a"}) is None


def test_where_no_completion_is_read_none_may_be_named():
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "answer": "d", "label": 0}
    for likelihood, message in ((PAIRS, "preference pairs have"), ("regression", "a regression")):
        assert found(row, likelihood) is None
        with pytest.raises(ValueError, match=f"--completion-field: {message}"):
            found(row, likelihood, asked=Columns(completion="answer"))


def test_score_finds_or_refuses_the_texts_after_prompts(posterior, tmp_path):
    def file(name, n=3):
        pairs = map(parts, reviews(n, 0))
        rows = [{"prompt": prompt, name: text} for prompt, text in pairs]
        return write_json_lines(tmp_path / f"{name}.jsonl", rows)

    folder = posterior("decoder", file("completion", 24))
    args = ("score", folder, "--top-k", 4, "-q", "--data")
    expected = run(*args, file("completion")).stdout
    assert len(json.loads(expected.splitlines()[0])["tokens"]) == 2
    assert run(*args, file("answer")).stdout == expected
    assert "Name it by --completion-field" in refused(*args, file("output"))
    assert run(*args, file("output"), "--completion-field", "output").stdout == expected
    run("generate", folder, "--data", file("output"), "--max-new-tokens", 1, "--top-k", 4, "-q")
    message = refused("predict", folder, "--data", file("output"))
    assert "laplace-lora score" in message


def test_a_column_beside_whole_texts_changes_nothing(adapter, tmp_path):
    plain = [{"text": row["text"]} for row in reviews(24, 0)]
    more = [{**row, "response": " good"} for row in plain]
    texts, beside = (
        write_json_lines(tmp_path / f"{name}.jsonl", rows)
        for name, rows in (("texts", plain), ("beside", more))
    )
    folder = adapter("decoder")
    message = refused("fit", folder, "--data", beside, "-q")
    assert "say --text-field text for whole texts, --completion-field response for" in message
    run("fit", folder, "--data", beside, "--text-field", "text", "-q")
    args = ("score", folder, "--top-k", 4, "-q", "--data")
    expected = run(*args, texts).stdout
    assert len(json.loads(expected.splitlines()[0])["tokens"]) == 3
    assert run(*args, beside).stdout == expected


def test_single_rewards_are_of_texts_after_prompts(adapter, tmp_path):
    def file(name, rows):
        return write_json_lines(tmp_path / f"{name}.jsonl", rows)

    good, bad = ({"prompt": "the film was", "text": f" {word}"} for word in ("good", "bad"))
    pair = {"prompt": good["prompt"], "chosen": good["text"], "rejected": bad["text"]}
    folder, pairs = adapter("one output"), file("pairs", [pair] * 12)
    run("fit", folder, "--data", pairs, "-q")
    args = ("predict", folder, "-q", "--data")
    single = file("single", [good, bad])
    assert "which column follows 'prompt' is not clear" in refused(*args, single)
    named = run(*args, single, "--completion-field", "text").stdout
    whole = file("whole", [{"text": row["prompt"] + row["text"]} for row in (good, bad)])
    assert run(*args, whole, "--text-field", "text").stdout == named
    first, second = (json.loads(line)["reward"] for line in named.splitlines())
    assert first > second
    message = refused(*args, pairs, "--completion-field", "chosen")
    assert "preference pairs have no completions" in message
