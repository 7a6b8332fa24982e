"""``laplace-lora fit`` does what the Python calls do, and leaves nothing behind when it fails."""

import json

import pytest
import torch
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification, DataCollatorWithPadding

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace
from laplace_lora.commands.reading.adapter import load_adapter
from laplace_lora.commands.reading.plan import PLAN
from laplace_lora.storage.adapter_start import FILE as START
from laplace_lora.storage.adapter_start import AdapterStart
from laplace_lora.storage.files import CONFIG, TENSORS
from support.command_line import refused, run
from support.on_disk import reviews, tokenizer, write_json_lines, write_table
from support.references import assert_near

CLASSES = {"kron": KronLoraLaplace, "full": FullLoraLaplace, "diag": DiagLoraLaplace}
TEXTS = ["the film was bad", "the meal was fine"]


def loader(n, seed, scale=1):
    words = tokenizer()
    rows = [{**words(r["text"]), "labels": scale * r["label"]} for r in reviews(n, seed)]
    return DataLoader(rows, batch_size=8, collate_fn=DataCollatorWithPadding(words))


def model_of(folder, made):
    base = made("classifier").parent / "base"
    model = BertForSequenceClassification.from_pretrained(base, num_labels=2)
    return PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize(
    "structure",
    ["kron", *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "diag"))],
)
def test_it_is_the_python_calls(adapter, data, made, structure):
    folder = adapter()
    args = ["--data", data("train"), "--val", data("val"), "--structure", structure]
    result = run("fit", folder, *args)
    assert result.stdout.startswith(f"{CLASSES[structure].__name__}: classification")
    assert "Tuned by" in result.stderr and "Calibrated" in result.stderr
    model = model_of(folder, made)
    la = CLASSES[structure](model, "classification")
    la.fit(loader(48, 0))
    la.optimize_prior_precision()
    la.calibrate(loader(32, 1))
    again = CLASSES[structure].from_pretrained(model, folder)
    expected = la.predict(TEXTS, tokenizer()).probs.numpy()
    # Files round to float16 what can be rounded.
    assert again.predict(TEXTS, tokenizer()).probs.numpy() == pytest.approx(expected, abs=1e-4)


def test_without_validation_data_nothing_is_calibrated(adapter, tmp_path):
    folder = adapter()
    train = write_json_lines(tmp_path / "train.jsonl", reviews(96, 0))  # the mean stays
    result = run("fit", folder, "--data", train)
    assert "nothing: width, temperature and mean as fitted" in result.stdout


def test_tables_with_named_columns_and_labels(adapter, data, tmp_path):
    folder = adapter()
    names = ["unhappy", "happy"]
    rows = [{"review": r["text"], "mood": names[r["label"]]} for r in reviews(48, 0)]
    table = write_table(tmp_path / "train.csv", rows)
    columns = ["--text-field", "review", "--label-field", "mood", "--labels", *names]
    torch.manual_seed(0)  # of the head that the adapter replaces; the files count it, too
    run("fit", folder, "--data", table, *columns)
    plan = json.loads((folder / PLAN).read_text())
    assert plan["names"] == names and plan["columns"]["text"] == "review"
    tensors = (folder / TENSORS).read_bytes()
    torch.manual_seed(0)
    run("fit", folder, "--data", data("train"), "--overwrite")
    assert (folder / TENSORS).read_bytes() == tensors


@pytest.mark.slow
def test_numerals_as_names_are_not_mixed_with_numbers(adapter, data, tmp_path):
    folder, names = adapter(), ["1", "2"]
    tests = {
        "numbers": data("test"),
        "names": data("val", lambda row: {**row, "label": row["label"] + 1}),
    }
    only = write_json_lines(tmp_path / "ones.jsonl", [{"text": "the film was good", "label": 1}])
    for form, shift in (("numbers", 0), ("names", 1)):
        train = data("train", lambda row, shift=shift: {**row, "label": row["label"] + shift})
        run("fit", folder, "--data", train, "--labels", *names, "-q", "--overwrite")
        assert json.loads((folder / PLAN).read_text())["labels_as"] == form
        found = run("evaluate", folder, "--data", tests[form], "--out", "-", "-q").stdout
        assert json.loads(found)[0]["values"]["accuracy"] < 1  # one in eight is mislabelled
        other = tests["names" if form == "numbers" else "numbers"]
        assert f"which is none of the {form}" in refused("evaluate", folder, "--data", other)
        scores = [
            json.loads(run("evaluate", folder, "--data", only, "--out", "-", "-q", *args).stdout)
            for args in ((), ("--labels-as", form))
        ]
        assert scores[0] == scores[1]
        assert scores[0][0]["values"]["accuracy"] == (form == "numbers")
    message = refused("fit", folder, "--data", only, "--labels", *names, "--overwrite")
    assert "Say which by --labels-as names or --labels-as numbers" in message


@pytest.mark.slow
def test_a_plan_of_an_earlier_version_does_not_say_how_labels_were_read(posterior, data):
    folder = posterior("classifier", data("train"))
    plan = json.loads((folder / PLAN).read_text())
    expected = run("evaluate", folder, "--data", data("test"), "--out", "-", "-q").stdout
    del plan["labels_as"]
    (folder / PLAN).write_text(json.dumps(plan))
    assert run("evaluate", folder, "--data", data("test"), "--out", "-", "-q").stdout == expected
    (folder / PLAN).write_text(json.dumps({**plan, "labels_as": "letters"}))
    message = refused("evaluate", folder, "--data", data("test"))
    assert "is damaged" in message and "labels_as is 'letters'" in message


def test_quiet_says_only_what_it_saved(adapter, data):
    result = run("fit", adapter(), "--data", data("train"), "--quiet")
    assert result.stderr == "" and "Saved in" in result.stdout


def test_the_posterior_may_go_elsewhere(adapter, data, tmp_path):
    folder, elsewhere = adapter(), tmp_path / "new" / "posterior"
    run("fit", folder, "--data", data("train"), "--out", elsewhere)
    assert {p.name for p in elsewhere.iterdir()} == {TENSORS, CONFIG, PLAN}
    assert not (folder / TENSORS).exists()


def test_a_posterior_is_not_replaced_unasked(adapter, data):
    folder = adapter()
    (folder / TENSORS).write_bytes(b"earlier")
    assert "--overwrite" in refused("fit", folder, "--data", data("train"))
    assert (folder / TENSORS).read_bytes() == b"earlier"


def test_a_posterior_within_a_file_is_refused_before_any_work(data, tmp_path):
    within = tmp_path / "train.jsonl" / "x"
    message = refused("fit", "no-adapter", "--data", data("train"), "--out", within)
    assert "train.jsonl, which is a file" in message


BAD = {
    "no label": ({"text": "the film was good"}, "no column for the label"),
    "empty text": ({"text": "", "label": 1}, "row 2 has no text"),
    "unknown label": ({"text": "the film", "label": "great"}, "row 2 has the label 'great'"),
    "label too large": ({"text": "the film", "label": 2}, "a number from 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named_and_nothing_is_left(adapter, tmp_path, case):
    folder = adapter()
    before = sorted(p.name for p in folder.iterdir())
    row, message = BAD[case]
    first = {"text": "the meal was bad", "label": 0} if "label" in row else row
    path = write_json_lines(tmp_path / "bad.jsonl", [first, row])
    assert message in refused("fit", folder, "--data", path)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_truth_values_are_the_numbers_of_classes_without_names(posterior, data):
    folder = posterior("classifier", data("train"))
    args = ("evaluate", folder, "--out", "-", "-q", "--data")
    expected = run(*args, data("test")).stdout
    told = data("test", lambda row: {**row, "label": bool(row["label"])})
    assert run(*args, told).stdout == expected
    message = refused("fit", folder, "--data", told, "--labels", "bad", "good", "--overwrite")
    assert "row 1 has the label True; expected one of 'bad', 'good', or a number from 0" in message


def test_a_failure_after_the_fit_leaves_nothing(adapter, data, monkeypatch):
    folder = adapter()
    before = sorted(p.name for p in folder.iterdir())

    def fail(*_, **__):
        raise RuntimeError("the disk burns")

    monkeypatch.setattr("laplace_lora.posteriors.calibrated.Tuner.calibrate", fail)
    args = ["--data", data("train"), "--val", data("val")]
    assert "the disk burns (RuntimeError; --debug shows where)" in refused("fit", folder, *args)
    assert sorted(p.name for p in folder.iterdir()) == before


def test_an_adapter_that_guesses_is_told(adapter, data):
    swapped = data("train", lambda row: {**row, "label": 1 - row["label"]})
    result = run("fit", adapter(), "--data", swapped)
    assert "Warning: the adapter's mean loss" in result.stderr
    assert "Warning" not in run("fit", adapter("one output"), "--data", data("train")).stderr


def test_a_regression(adapter, data):
    folder = adapter("one output")
    result = run("fit", folder, "--data", data("train"))
    assert ": regression by" in result.stdout
    result = run("fit", folder, "--data", data("train"), "--val", data("val"), "--overwrite")
    assert "Calibrated: " in result.stderr and "observation noise" in result.stderr
    args = ("--data", data("train"), "--labels-as", "numbers", "--overwrite")
    assert "--labels-as: a regression posterior has no classes" in refused("fit", folder, *args)
    args = ("--likelihood", "reward_modeling", "--pair-field", "text", "--overwrite")
    message = refused("fit", folder, "--data", data("train"), *args)
    assert "--pair-field: a reward_modeling posterior reads no second text" in message


@pytest.mark.slow
def test_the_noise_of_a_regression_is_that_of_its_labels(adapter, data, made):
    folder = adapter("one output")
    train = data("train", lambda row: {**row, "label": 100 * row["label"]})
    run("fit", folder, "--data", train)
    base = made("one output").parent / "base"
    model = BertForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, folder)
    la = KronLoraLaplace(model, "regression")
    la.fit(loader(48, 0, scale=100.0))
    la.optimize_prior_precision(tune_sigma_noise=True)
    again = KronLoraLaplace.from_pretrained(model, folder)
    assert float(again.sigma_noise) == pytest.approx(float(la.sigma_noise), rel=1e-3)
    assert float(again.sigma_noise) > 20  # the labels' own deviation is about 50


def test_a_single_sigmoid(adapter, made, tmp_path):
    """A classifier of one label, which its configuration alone tells from a regression."""
    folder, base = adapter("one output"), tmp_path / "base"
    kind = {"num_labels": 1, "problem_type": "multi_label_classification"}
    BertForSequenceClassification.from_pretrained(
        made("one output").parent / "base", **kind
    ).save_pretrained(base)
    tokenizer().save_pretrained(base)
    rows = reviews(16, 0)
    listed = [{**row, "label": [row["label"]]} for row in rows]
    found = []
    for each in (rows, listed):
        path = write_json_lines(tmp_path / "rows.jsonl", each)
        options = ("--base", base, "--data", path)
        assert ": multilabel by" in run("fit", folder, *options, "--overwrite").stdout
        line, *_ = run("predict", folder, *options, "--quiet").stdout.splitlines()
        (probability,) = json.loads(line)["probabilities"].values()
        found.append(probability)
    loaded = load_adapter(str(folder), base=str(base))
    la = KronLoraLaplace.from_pretrained(loaded.model, folder)
    expected = float(la(dict(loaded.tokenizer([rows[0]["text"]], return_tensors="pt"))))
    assert found == pytest.approx([expected] * 2, rel=1e-4) and 0.0 < expected < 1.0


def test_a_reward_model_from_preference_pairs(adapter, tmp_path):
    folder = adapter("one output")
    good, bad = "the film was good", "the film was bad"
    rows = [{"chosen": good, "rejected": bad}, {"chosen": "the meal was fine", "rejected": bad}]
    path = write_json_lines(tmp_path / "pairs.jsonl", rows * 6)
    result = run("fit", folder, "--data", path)
    title = result.stdout.partition(": reward_modeling by ")[2].partition("\n")[0]
    assert title and "output" not in title  # its one output, of the two texts of a pair
    assert "outputs" not in run("info", folder).stdout


def test_arguments_that_do_not_go_together(adapter, data):
    folder, train = adapter(), data("train")
    cases = {
        ("--target", "good", "bad"): "for language models",
        ("--labels", "a", "b", "c"): "names 3 classes, the model has 2",
        ("--labels", "a", "a"): "names a class twice",
        ("--likelihood", "language_modeling"): "possible: classification, multilabel, regression",
        ("--chat",): "the tokenizer has no chat template",
        ("--text-field", "review"): "no column 'review'",
        ("--out", train): "is a file; give a folder",
    }
    for args, message in cases.items():
        assert message in refused("fit", folder, "--data", train, *args)
    assert "say where the posterior goes by --out" in refused("fit", "me/it", "--data", train)
    for name in ("my-adaptr", "/no/such/adapter"):
        message = refused("fit", name, "--data", train)
        assert f"there is no folder {name}" in message and "--out" not in message


def test_the_start_beside_the_adapter_is_the_priors_mean(adapter, data, made):
    folder = adapter()
    args = ["--data", data("train"), "--overwrite"]
    model = model_of(folder, made)
    start = AdapterStart({n: p + 0.5 for n, p in model.named_parameters() if "lora" in n})
    start.save_pretrained(folder)
    result = run("fit", folder, *args)
    assert f"Warning: {START} is left out" in result.stderr  # the head's is not known
    base = BertForSequenceClassification.from_pretrained(
        made("classifier").parent / "base", num_labels=2
    )
    model = PeftModel.from_pretrained(base, folder, is_trainable=True)
    own = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    AdapterStart({name: tensor + 0.5 for name, tensor in own.items()}).save_pretrained(folder)
    result = run("fit", folder, *args)
    assert START not in result.stderr
    la = KronLoraLaplace.from_pretrained(model, folder)
    assert_near(la.prior_mean, la.mean + 0.5, 1e-6)


def test_a_regression_of_several_outputs(adapter, tmp_path):
    rows = [{"text": row["text"], "label": [row["label"], 0.5]} for row in reviews(16, 0)]
    folder, path = adapter(), write_json_lines(tmp_path / "two.jsonl", rows)
    args = ("fit", folder, "--data", path, "--likelihood", "regression", "-q")
    run(*args)
    line, *_ = run("predict", folder, "--data", path, "-q").stdout.splitlines()
    loaded = load_adapter(str(folder))
    la = KronLoraLaplace.from_pretrained(loaded.model, folder)
    mean, covariance = la(loaded.tokenizer([rows[0]["text"]], return_tensors="pt"))
    found = json.loads(line)
    assert found["mean"] == pytest.approx(mean[0].tolist(), rel=1e-4)
    variance = covariance[0].diagonal()
    assert found["std"] == pytest.approx(variance.sqrt().tolist(), rel=1e-3)
    observed = (variance + la.sigma_noise**2).sqrt()
    assert found["observation_std"] == pytest.approx(observed.tolist(), rel=1e-3)
    assert found["observation_std"][0] > 2 * found["std"][0]
    write_json_lines(path, [*rows, {"text": "the film", "label": 1}])
    assert "row 17 has the label 1; expected a list of 2 numbers" in refused(*args, "--overwrite")
