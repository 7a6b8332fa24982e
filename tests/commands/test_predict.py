"""``laplace-lora predict`` and ``evaluate``: rows in their order, read as in the fit."""

import datetime
import gzip
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, DataCollatorWithPadding

from laplace_lora import KronLoraLaplace
from laplace_lora.commands.evaluating import _check_has_classes, _rule
from laplace_lora.commands.reading.adapter import load_adapter
from laplace_lora.commands.reading.plan import PLAN
from laplace_lora.evaluation.metrics import METRICS
from laplace_lora.storage.files import TENSORS
from support.command_line import refused, run
from support.on_disk import (
    SIZES,
    preferences,
    read_json_lines,
    reviews,
    save_classifier,
    tokenizer,
    write_json_lines,
)

FOUND = ("prediction", "probabilities", "entropy", "mutual_information")


@pytest.fixture
def fitted(adapter, tmp_path):
    folder = adapter()
    train = write_json_lines(tmp_path / "train.jsonl", reviews(48, 1))  # the mean stays
    run("fit", folder, "--data", train, "--labels", "bad", "good", "-q")
    return folder


def test_rows_come_in_order_with_what_is_kept(fitted, data, tmp_path):
    rows = reviews(20, 2)
    rows[3]["text"] = " ".join([rows[3]["text"]] * 4)  # lengths are sorted inside
    path, out = write_json_lines(tmp_path / "x.jsonl", rows), tmp_path / "y.jsonl"
    result = run("predict", fitted, "--data", path, "--out", out, "--keep", "id", "label", "-q")
    assert result.output == ""
    found = read_json_lines(out)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert all(tuple(row) == ("id", "label", *FOUND) for row in found)
    alone = run("predict", fitted, "--data", "-", "-q", given=json.dumps(rows[3]))
    (single,) = map(json.loads, alone.stdout.splitlines())
    assert single["probabilities"] == pytest.approx(found[3]["probabilities"])
    for row in found:
        p = torch.tensor([row["probabilities"][name] for name in ("bad", "good")]).double()
        assert float(p.sum()) == pytest.approx(1)
        assert row["entropy"] == pytest.approx(float(-(p * p.log()).sum()), rel=1e-3)
        assert 0 < row["mutual_information"] < row["entropy"]
        assert row["prediction"] == ("bad", "good")[int(p.argmax())]


def test_a_posterior_of_an_adapter_with_another_name_is_asked_as_well(adapter, data, tmp_path):
    """Commands load each adapter as PEFT does, by the name ``default``."""
    folder = adapter()
    base = load_adapter(str(folder)).model.unload()
    model = PeftModel.from_pretrained(base, folder, adapter_name="mood", is_trainable=True)
    rows = [{**tokenizer()(row["text"]), "labels": row["label"]} for row in reviews(48, 0)]
    la = KronLoraLaplace(model, "classification")
    la.fit(DataLoader(rows, 8, collate_fn=DataCollatorWithPadding(tokenizer())))
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path / "mood")
    la.save_pretrained(tmp_path / "mood", precision="exact")
    path = write_json_lines(tmp_path / "x.jsonl", reviews(3, 2))
    result = run("predict", tmp_path / "mood", "--data", path, "-q")
    expected = la.predict([row["text"] for row in reviews(3, 2)], tokenizer()).probs
    for line, p in zip(result.stdout.splitlines(), expected, strict=True):
        assert list(json.loads(line)["probabilities"].values()) == pytest.approx(p.tolist(), 1e-4)


def test_rows_may_lack_columns_that_others_have(adapter, data, tmp_path):
    def both(row, of_first):
        second = {} if row["id"] == "row-0" else {"text_pair": "the meal was bad", "kind": "b"}
        return {**row, **of_first, **second}

    args = ("--data", data("train", lambda row: both(row, {"text_pair": None})), "-q")
    folder = adapter()
    run("fit", folder, *args)
    keep = ("--keep", "text_pair")
    expected = run("predict", folder, *args, *keep).stdout
    args = ("--data", data("train", lambda row: both(row, {})), "-q")
    run("fit", folder, *args, "--overwrite")
    assert json.loads((folder / PLAN).read_text())["columns"]["pair"] == "text_pair"
    for line, other in zip(
        run("predict", folder, *args, *keep).stdout.splitlines(), expected.splitlines(), strict=True
    ):
        row, other = json.loads(line), json.loads(other)
        assert row["text_pair"] == other["text_pair"]
        assert row["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    message = refused("evaluate", folder, *args, "--group-field", "kind")
    assert "row 1 has no group: its column 'kind' is missing" in message


@pytest.mark.slow
def test_a_kept_column_does_not_take_the_name_of_a_result(fitted, adapter, data, tmp_path):
    def named(row):
        return {
            **row,
            "observation_std": 5,
            "prediction": "mine",
            "mean": 1,
            "reward": 2,
            "std": 3,
            "entropy": 4,
        }

    pairs = [{"chosen": "the film was good", "rejected": "the film was bad", **named({})}] * 9
    path, test = write_json_lines(tmp_path / "pairs.jsonl", pairs), data("test", named)
    reward, regression = adapter("one output"), tmp_path / "regression"
    run("fit", reward, "--data", data("train"), "--out", regression, "-q")
    run("fit", reward, "--data", path, "-q")
    args = ("--posterior", regression)
    for given, taken, free in (
        ((fitted, "--data", test), ("prediction", "entropy"), ("mean", "std", "reward")),
        (
            (reward, *args, "--data", test),
            ("mean", "std", "observation_std"),
            ("prediction", "reward", "entropy"),
        ),
        ((reward, "--data", test), ("reward", "std"), ("prediction", "mean", "entropy")),
        ((reward, "--data", path), ("prediction", "entropy"), ("mean", "std", "reward")),
    ):
        for name in taken:
            message = refused("predict", *given, "--keep", "std", name)
            assert f"--keep {'std' if 'std' in taken else name}: results have" in message
        plain = json.loads(run("predict", *given, "-q").stdout.splitlines()[0])
        assert set(taken) <= set(plain)
        kept = run("predict", *given, "--keep", *free, "-q").stdout.splitlines()[0]
        assert json.loads(kept) == {**{name: named({})[name] for name in free}, **plain}


def test_standard_input_and_output(fitted, data):
    path = data("test")
    result = run("predict", fitted, "--data", "-", given=path.read_text())
    assert [json.loads(line)["prediction"] for line in result.stdout.splitlines()]
    assert len(result.stdout.splitlines()) == 20


def test_a_failure_leaves_the_earlier_results(fitted, data, tmp_path, monkeypatch):
    out = tmp_path / "y.jsonl"
    out.write_text("earlier")

    def broken(*_):
        yield {"prediction": 0}
        raise ValueError("after one row")

    monkeypatch.setattr("laplace_lora.commands.predicting.result_rows", broken)
    assert "after one row" in refused("predict", fitted, "--data", data("test"), "--out", out)
    assert out.read_text() == "earlier" and len(list(tmp_path.glob("y.jsonl*"))) == 1


def test_results_are_readable_by_others_as_new_files_are(fitted, data, tmp_path):
    out, plain = tmp_path / "y.jsonl", tmp_path / "plain"
    run("predict", fitted, "--data", data("test"), "--out", out, "-q")
    plain.touch()
    assert out.stat().st_mode == plain.stat().st_mode


def test_bad_arguments_are_refused_before_the_model_is_loaded(tmp_path, data):
    cases = {
        ("--out", tmp_path): "is a folder",
        ("--out", tmp_path / "gone" / "y.jsonl"): "does not exist",
        ("--out", tmp_path / "y.csv"): "name the file .json or .jsonl",
        ("--out", tmp_path / "y.CSV"): "name the file .json or .jsonl",
        ("--keep", "key"): "the data have 'id', 'text', 'label'",
    }
    for args, message in cases.items():
        assert message in refused("predict", "no-adapter", "--data", data("test"), *args)


@pytest.mark.parametrize("command", ["predict", "evaluate", "score", "generate"])
def test_results_do_not_replace_the_data(tmp_path, data, command):
    """Whose labels would be lost; also under another name, or within a folder."""
    pytest.importorskip("datasets")
    path = data("test")
    content = path.read_text()
    link, hard, folder = (tmp_path / name for name in ("link.jsonl", "hard.jsonl", "folder"))
    link.symlink_to(path)
    hard.hardlink_to(path)
    folder.mkdir()
    (folder / "train.jsonl").write_text(content)
    relative = f"{tmp_path}/folder/../{path.name}"
    for source, out in (
        (path, path),
        (path, link),
        (link, path),
        (path, hard),
        (path, relative),
        (folder, folder / "train.jsonl"),
        (f"{folder}:train", folder / "train.jsonl"),
    ):
        message = refused(command, "no-adapter", "--data", source, "--out", out)
        assert f"--out {out} belongs to the data {source}, which results would replace" in message
    assert path.read_text() == content
    args = (command, "no-adapter", "--data", f"{folder}:train", "--out", folder / "new.jsonl")
    for _ in range(2):
        assert "would replace" not in refused(*args)
        (folder / "new.jsonl").write_text("earlier")  # is no part of a split


def test_scores_do_not_replace_other_data(tmp_path, data):
    path, other, picture = data("test"), data("val"), tmp_path / "picture.svg"
    picture.symlink_to(other)
    for option in ("--ood", "--apart"):
        for name, out in (("--out", other), ("--plot", picture)):
            args = ("evaluate", "no-adapter", "--data", path, option, other, name, out)
            assert f"{name} {out} belongs to the data {other}" in refused(*args)


def test_results_go_through_a_link_and_not_into_a_pipe(fitted, data, tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target.jsonl", "link.jsonl", "pipe"))
    link.symlink_to(target)
    run("predict", fitted, "--data", data("test"), "--out", link, "-q")
    assert link.is_symlink() and len(target.read_text().splitlines()) == 20
    os.mkfifo(pipe)
    args = ("predict", "no-adapter", "--data", data("test"), "--out", pipe)
    assert "is no file; --out - writes to standard output" in refused(*args)
    assert pipe.is_fifo()
    link.unlink()
    link.symlink_to(tmp_path / "gone" / "target.jsonl")
    message = refused("predict", "no-adapter", "--data", data("test"), "--out", link)
    assert f"{link} lies in {tmp_path / 'gone'}, which does not exist" in message


def test_scores_and_pictures_go_through_links(fitted, data, tmp_path):
    links = {"--out": tmp_path / "scores.json", "--plot": tmp_path / "report.svg"}
    targets = {name: tmp_path / f"target-{link.name}" for name, link in links.items()}
    for name, link in links.items():
        targets[name].write_text("earlier")
        link.symlink_to(targets[name])
    files = [word for pair in links.items() for word in pair]
    run("evaluate", fitted, "--data", data("test"), "-q", *files)
    assert all(link.is_symlink() for link in links.values())
    assert json.loads(targets["--out"].read_text())[1]["name"] == "Laplace"
    assert "<svg" in targets["--plot"].read_text()


@pytest.mark.parametrize("command", ["predict", "fit"])
def test_where_nothing_can_be_written_is_known_before_any_work(
    adapter, tmp_path, data, monkeypatch, command
):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    message = refused(command, adapter(), "--data", data("test"), "--out", tmp_path / "x")
    assert f"would lie in {tmp_path}, which may not be written to" in message


def test_other_names_of_columns_and_labels(fitted, data, tmp_path):
    rows = [{"review": row["text"]} for row in reviews(4, 2)]
    path = write_json_lines(tmp_path / "x.jsonl", rows)
    message = refused("predict", fitted, "--data", path)
    assert "fitted on the column 'text'; the data have 'review'" in message
    args = ["--text-field", "review", "--labels", "-", "+", "-q"]
    result = run("predict", fitted, "--data", path, *args)
    assert set(json.loads(result.stdout.splitlines()[0])["probabilities"]) == {"-", "+"}
    assert "names 1 classes" in refused("predict", fitted, "--data", path, *args[:4])


def test_a_posterior_elsewhere(adapter, data, tmp_path):
    folder, elsewhere = adapter(), tmp_path / "posterior"
    run("fit", folder, "--data", data("train"), "--out", elsewhere, "-q")
    message = refused("predict", folder, "--data", data("test"))
    assert "holds no posterior" in message and "--posterior" in message
    run("predict", folder, "--data", data("test"), "--posterior", elsewhere, "-q")


def test_a_plan_of_another_posterior_is_refused(fitted, adapter, data, tmp_path):
    other = tmp_path / "other"
    run("fit", fitted, "--data", data("val"), "--out", other, "-q")
    (fitted / TENSORS).write_bytes((other / TENSORS).read_bytes())
    assert "belongs to another posterior" in refused("predict", fitted, "--data", data("test"))
    (fitted / PLAN).write_text("{}")
    assert "is damaged" in refused("predict", fitted, "--data", data("test"))
    (fitted / PLAN).write_text('{"version": 9}')
    assert "update it" in refused("predict", fitted, "--data", data("test"))
    (fitted / PLAN).unlink()  # as a posterior that was saved from Python
    result = run("predict", fitted, "--data", data("test"), "-q")
    assert set(json.loads(result.stdout.splitlines()[0])["probabilities"]) == {"0", "1"}


@pytest.mark.slow
def test_regressions_and_rewards_have_moments(posterior, data, tmp_path):
    folder = posterior("one output", data("train"))
    first = json.loads(run("predict", folder, "--data", data("test"), "-q").stdout.splitlines()[0])
    assert set(first) == {"mean", "std", "observation_std"} and first["std"] > 0
    for saved_from_python in (False, True):
        if saved_from_python:
            (folder / PLAN).unlink()
        args = (folder, "--data", data("test"), "--labels", "bad", "good")
        assert "--labels: a regression posterior has no classes" in refused("predict", *args)
        for option in (("--labels", "bad", "good"), ("--labels-as", "names")):
            message = refused("evaluate", folder, "--data", data("test"), *option)
            assert "evaluate scores class probabilities; this is a regression" in message
    pairs = [{"chosen": "the film was good", "rejected": "the film was bad"}] * 9
    path = write_json_lines(tmp_path / "pairs.jsonl", pairs)
    run("fit", folder, "--data", path, "--overwrite", "-q")
    first = json.loads(run("predict", folder, "--data", path, "-q").stdout.splitlines()[0])
    assert set(first["probabilities"]) == {"rejected", "chosen"}
    first = json.loads(run("predict", folder, "--data", data("test"), "-q").stdout.splitlines()[0])
    assert set(first) == {"reward", "std"}


@pytest.mark.slow
def test_labels_that_do_not_exclude_each_other(posterior, data):
    names = ["unhappy", "happy"]

    def tagged(row):
        return {**row, "label": [names[row["label"]]]}

    folder = posterior("classifier", data("train", tagged), "--labels", *names)
    result = run("predict", folder, "--data", data("test", tagged), "-q")
    first = json.loads(result.stdout.splitlines()[0])
    assert all(set(first[name]) == set(names) for name in FOUND[1:])
    assert first["prediction"] == [n for n in names if first["probabilities"][n] > 0.5]
    result = run("evaluate", folder, "--data", data("test", tagged), "-q")
    assert "Laplace" in result.stdout
    for label, given in (("[1, 0]", [1, 0]), ("['sad']", ["sad"]), ("[1]", [1])):
        path = data("test", lambda row, given=given: {**row, "label": given})
        args = ("evaluate", folder, "--data", path, "-q")
        if given == [1, 0]:
            run(*args)
        else:
            assert f"row 1 has the label {label}" in refused(*args)


def test_long_texts_are_cut_for_a_head(fitted, tmp_path):
    rows = [{"text": "the film was good " * n} for n in (6, 60)]  # 24 tokens are the limit
    path = write_json_lines(tmp_path / "long.jsonl", rows)
    result = run("predict", fitted, "--data", path, "-q")
    cut, longer = (json.loads(line) for line in result.stdout.splitlines())
    assert cut["probabilities"] == pytest.approx(longer["probabilities"], abs=1e-6)
    result = run("predict", fitted, "--data", path, "-q", "--max-length", 3)
    assert json.loads(result.stdout.splitlines()[0]) != cut


def test_classes_of_one_name_are_refused(fitted, data, tmp_path):
    """Whose probabilities would stand under one name in the results."""
    args = ("--data", data("test"), "-q")
    assert "names a class twice: 'a', 'a'" in refused(
        "predict", fitted, *args, "--labels", "a", "a"
    )
    base = tmp_path / "same-names"
    config = BertConfig(**SIZES, num_labels=2, id2label={0: "other", 1: "other"})
    BertForSequenceClassification(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    folder = shutil.copytree(fitted, tmp_path / "copy")
    args = ("fit", folder, *args, "--base", base, "--overwrite")
    assert "the model names a class twice: 'other', 'other'; give" in refused(*args)
    run(*args, "--labels", "a", "b")


def test_whatever_is_in_a_column_can_be_kept(fitted, tmp_path):
    datasets = pytest.importorskip("datasets")
    when = datetime.datetime(2026, 1, 2, 3, 4)
    rows = [{"text": row["text"], "when": when, "share": math.nan} for row in reviews(3, 2)]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "dated"))
    args = ("--data", tmp_path / "dated", "--keep", "when", "share", "-q")
    line, *_ = run("predict", fitted, *args).stdout.splitlines()
    kept = json.loads(line, parse_constant=pytest.fail)
    assert (kept["when"], kept["share"]) == ("2026-01-02T03:04:00", None)


@pytest.mark.slow
def test_scores_that_are_not_known_are_null(adapter, tmp_path):
    rows = [{**row, "label": []} for row in reviews(16, 0)]  # no label applies anywhere
    folder, path = adapter(), write_json_lines(tmp_path / "none.jsonl", rows)
    run("fit", folder, "--data", path, "-q")
    content = run("evaluate", folder, "--data", path, "--out", "-", "-q").stdout
    report, _ = json.loads(content, parse_constant=pytest.fail)
    assert report["values"]["mAP"] is None and report["values"]["NLL"] > 0


@pytest.mark.slow
def test_evaluate_compares_with_the_map(fitted, data, tmp_path):
    out, plot = tmp_path / "scores.json", tmp_path / "report.png"
    result = run("evaluate", fitted, "--data", data("test"), "--out", out, "-q", "--plot", plot)
    assert "MAP" in result.stdout and "Laplace" in result.stdout and "ECE" in result.stdout
    by_map, by_laplace = json.loads(out.read_text())
    assert by_map["examples"] == 20 and set(by_map["values"]) == set(METRICS)
    assert by_map["values"]["NLL"] != by_laplace["values"]["NLL"]
    assert plot.read_bytes().startswith(b"\x89PNG")
    predicted = run("predict", fitted, "--data", data("test"), "--keep", "label", "-q").stdout
    rows = [json.loads(line) for line in predicted.splitlines()]
    p = torch.tensor([row["probabilities"][("bad", "good")[row["label"]]] for row in rows])
    assert by_laplace["values"]["NLL"] == pytest.approx(float(-p.log().mean()), rel=1e-5)


@pytest.mark.slow
def test_evaluate_compares_labels_of_any_number_with_the_sigmoid(adapter, tmp_path):
    """Not with the softmax, which the model's configuration, silent on the matter, would mean."""
    chosen, names = [["bad"], ["good"], ["bad", "good"], []], ("bad", "good")
    rows = [{**row, "label": chosen[i % 4]} for i, row in enumerate(reviews(24, 0))]
    folder, path = adapter(), write_json_lines(tmp_path / "labels.jsonl", rows)
    run("fit", folder, "--data", path, "--labels", *names, "-q")
    by_map, _ = json.loads(run("evaluate", folder, "--data", path, "--out", "-", "-q").stdout)
    loaded = load_adapter(str(folder))
    texts = loaded.tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    y = torch.tensor([[float(name in row["label"]) for name in names] for row in rows])
    with torch.no_grad():
        logits = loaded.model(**texts).logits
    expected = F.binary_cross_entropy_with_logits(logits, y)
    assert by_map["values"]["NLL"] == pytest.approx(float(expected), rel=1e-4)


def test_evaluate_writes_scores_to_standard_output(fitted, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("evaluate", fitted, "--data", data("test"), "--out", "-", "-q")
    assert [report["name"] for report in json.loads(result.stdout)] == ["MAP", "Laplace"]
    assert not (tmp_path / "-").exists()


@pytest.mark.slow
def test_evaluate_makes_sets_keeps_a_risk_and_scores_groups(fitted, data, tmp_path):
    pytest.importorskip("crepes")
    rows = [{**row, "thing": row["text"].split()[1]} for row in reviews(40, 5)]
    test = write_json_lines(tmp_path / "groups.jsonl", rows)
    apart = write_json_lines(tmp_path / "apart.jsonl", reviews(60, 6))
    out = tmp_path / "scores.json"
    args = ("evaluate", fitted, "--data", test, "-q", "--group-field", "thing", "--out", out)
    result = run(*args, "--apart", apart, "--risk", 0.3, "--coverage", 0.8)
    _, report = json.loads(out.read_text())
    assert {"coverage", "set size", "answered"} <= set(report["values"])
    line = f"Laplace: answer where a probability is above {report['threshold']!r}\n"
    assert line in result.stdout and "thing film" in result.stdout
    groups = {name: part["examples"] for name, part in report["by_group"].items()}
    assert sum(groups.values()) == 40 and set(groups) == {"film", "meal"}
    run(*args, "--apart", apart, "--coverage", 0.95)
    _, wider = json.loads(out.read_text())
    assert wider["values"]["set size"] > report["values"]["set size"]
    assert "answered" not in wider["values"]
    for option in ("--risk", "--coverage"):
        message = refused(*args, option, 0.3)
        assert f"{option} is" in message and "give them by --apart" in message
    assert "not in the range" in refused(*args, "--risk", 3, status=2)
    assert "no column for the group" in refused(
        "evaluate", fitted, "--data", test, "-q", "--group-field", "kind"
    )


def test_a_threshold_is_shown_with_all_digits():
    """Rounded it would let examples through for which nothing has been shown."""
    assert str(0.9784300923347473) in _rule(0.9784300923347473)
    for none in (None, 1.0):
        assert "answer nothing" in _rule(none)


@pytest.mark.slow
def test_results_may_be_packed(fitted, data, tmp_path):
    args, plain = ("--data", data("test"), "-q", "--out"), tmp_path / "y.jsonl"
    for command, out in (("predict", plain), ("evaluate", tmp_path / "y.json")):
        run(command, fitted, *args, out)
        run(command, fitted, *args, f"{out}.gz")
        assert gzip.decompress(Path(f"{out}.gz").read_bytes()) == out.read_bytes()
    rows = [json.loads(line) for line in run("predict", fitted, *args, "-").stdout.splitlines()]
    again = run("predict", fitted, "--data", f"{plain}.gz", "--text-field", "prediction", "-q")
    assert len(again.stdout.splitlines()) == len(rows)
    assert "results are JSON; name the file" in refused("predict", fitted, *args, "y.parquet")


@pytest.mark.slow
def test_evaluate_shows_the_names_of_groups_as_they_are(fitted, tmp_path):
    names = ["[en]", "[/bold]", ":smile:"]
    rows = [{**row, "kind": names[i % 3]} for i, row in enumerate(reviews(12, 5))]
    path = write_json_lines(tmp_path / "groups.jsonl", rows)
    shown = run("evaluate", fitted, "--data", path, "-q", "--group-field", "kind").stdout
    for name in names:
        assert f"kind {name}: 4" in shown


def test_evaluate_knows_data_of_another_kind(fitted, data, tmp_path):
    other = write_json_lines(tmp_path / "other.jsonl", [{"text": "was was the the"}] * 5)
    result = run("evaluate", fitted, "--data", data("test"), "--ood", other, "-q")
    assert "OOD AUROC (MI)" in result.stdout


def test_files_beside_the_data_are_read_as_they_are(adapter, tmp_path):
    """Second texts under another name would be left out without a word."""

    def file(name, field="text_pair", n=12):
        rows = [{**row, field: "was fine"} for row in reviews(n, 1)]
        return write_json_lines(tmp_path / name, rows)

    folder, paired, other = adapter(), file("paired.jsonl"), file("other.jsonl", "second")
    message = refused("fit", folder, "--data", paired, "--val", other, "-q")
    assert f"--val {other}: there is no column 'text_pair' with second texts" in message
    run("fit", folder, "--data", paired, "-q")
    for option in ("--apart", "--ood"):
        message = refused("evaluate", folder, "--data", paired, option, other, "-q")
        assert f"{option} {other}: there is no column 'text_pair' with" in message
    unlabelled = write_json_lines(tmp_path / "none.jsonl", [{"text": "bad", "text_pair": "the"}])
    message = refused("evaluate", folder, "--data", paired, "--apart", unlabelled, "-q")
    assert f"--apart {unlabelled}: row 1 has no label" in message
    assert "OOD AUROC" in run("evaluate", folder, "--data", paired, "--ood", unlabelled).stdout


def test_evaluate_refuses_what_it_cannot_score(posterior, data):
    folder = posterior("one output", data("train"))
    message = refused("evaluate", folder, "--data", data("test"))
    assert "this is a regression posterior" in message
    assert "`laplace-lora predict` gives mean and standard" in message and "score`" not in message
    for name in ("report.txt", "report.csv"):
        message = refused("evaluate", folder, "--data", data("test"), "--plot", name)
        assert "expected a file in .png" in message and "jsonl" not in message


def test_a_column_that_the_fit_did_not_read_changes_no_pair(adapter, tmp_path):
    folder, pairs = adapter("reward"), preferences(24, 0)
    run("fit", folder, "--data", write_json_lines(tmp_path / "train.jsonl", pairs), "-q")
    found = [
        run("predict", folder, "--data", write_json_lines(tmp_path / "x.jsonl", rows), "-q").stdout
        for rows in (pairs, [{"prompt": "the film was", **row} for row in pairs])
    ]
    assert found[0] == found[1]
    said = "'prompt' is not read: the fit's pairs had none; --text-field prompt reads it.\n"
    args = ("predict", folder, "--data", tmp_path / "x.jsonl")
    assert run(*args).stderr == said
    assert run(*args, "-q").stderr == run(*args, "--text-field", "prompt").stderr == ""


@pytest.mark.parametrize("likelihood", ["token_classification", "question_answering"])
def test_evaluate_names_no_command_where_there_is_none(likelihood):
    with pytest.raises(ValueError, match=rf"a {likelihood} posterior, .* From Python, `la"):
        _check_has_classes(likelihood)


def test_a_data_set_s_classes_are_those_of_the_fit(adapter, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows, folder = [{k: r[k] for k in ("text", "label")} for r in reviews(24, 0)], adapter()

    def saved(*names):
        features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
        data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        data.save_to_disk(tmp_path / names[0])
        return tmp_path / names[0]

    bad, good = saved("bad", "good"), saved("good", "bad")
    run("fit", folder, "--data", bad, "-q")
    assert json.loads((folder / PLAN).read_text())["names"] == ["bad", "good"]
    args = ("evaluate", folder, "--out", "-", "-q", "--data")
    path = write_json_lines(tmp_path / "x.jsonl", rows)
    assert run(*args, bad).stdout == run(*args, path).stdout
    for given in (("evaluate", folder), ("doctor", folder, "--labels", "bad", "good")):
        assert "'label' numbers the classes in the order 'good'" in refused(*given, "--data", good)
    for option, command in (("--apart", "evaluate"), ("--val", "fit")):
        given = (*((command, folder, "--data", bad)), *(["--overwrite"] * (command == "fit")))
        assert f"{option} {good}: the column" in refused(*given, option, good)


def test_a_data_set_s_numbers_are_none_of_the_names_that_the_fit_read(tmp_path):
    """Its label 1 is the class called "2"; all texts are of this class, and predicted as it."""
    datasets = pytest.importorskip("datasets")
    folder, names = save_classifier(tmp_path, outputs=3), ["1", "2", "3"]
    rows = [{"text": r["text"], "label": 1} for r in reviews(48, 0) if "good" in r["text"]]
    named = write_json_lines(tmp_path / "named.jsonl", [{**r, "label": "2"} for r in rows])
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    numbered = tmp_path / "numbered"
    datasets.Dataset.from_list(rows, features=features).save_to_disk(numbered)
    texts = [{"text": r["text"], "label": names[r["label"]]} for r in reviews(24, 0)]
    train = write_json_lines(tmp_path / "train.jsonl", [*texts, {"text": "meal", "label": "3"}])
    args = (folder, "--data", train, "--labels", *names, "-q", "--overwrite", "--val")
    calibrated = []
    for val in (named, numbered):
        run("fit", *args, val)
        content = json.loads(run("info", folder, "--json").stdout)
        calibrated.append(content["prior and calibration"])
    assert calibrated[0] == calibrated[1]
    assert json.loads((folder / PLAN).read_text())["labels_as"] == "names"

    def evaluated(*args):
        return json.loads(run("evaluate", folder, "--out", "-", "-q", *args).stdout)

    for options in (["--data"], ["--data", named, "--apart"]):
        found = evaluated(*options, numbered)
        assert found == evaluated(*options, named)
        assert found[0]["values"]["accuracy"] == 1
    asked = evaluated("--data", numbered, "--labels-as", "names")
    assert asked[0]["values"]["accuracy"] == 0


@pytest.mark.slow
def test_a_data_set_s_lists_of_classes_are_those_of_their_names(adapter, tmp_path):
    datasets = pytest.importorskip("datasets")
    names, folder = ["unhappy", "happy"], adapter()
    rows = [{"text": r["text"], "label": [0, 1][: r["label"] + 1]} for r in reviews(24, 0)]
    features = {"text": datasets.Value("string")}
    features["label"] = datasets.Sequence(datasets.ClassLabel(names=names))
    data = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    data.save_to_disk(tmp_path / "numbered")
    forms = {
        "named": [{**r, "label": [names[i] for i in r["label"]]} for r in rows],
        "zeros": [{**r, "label": [1, len(r["label"]) - 1]} for r in rows],
    }
    files = [write_json_lines(tmp_path / f"{form}.jsonl", x) for form, x in forms.items()]
    for own, others in ((tmp_path / "numbered", files), (files[0], [tmp_path / "numbered"])):
        labels = () if own.is_dir() else ("--labels", *names)
        run("fit", folder, "--data", own, "-q", "--overwrite", *labels)
        plan = json.loads((folder / PLAN).read_text())
        assert plan["names"] == names and plan["likelihood"] == "multilabel"
        args = ("evaluate", folder, "--out", "-", "-q", "--data")
        for other in others:
            assert run(*args, other).stdout == run(*args, own).stdout
