"""What a model's configuration says that its outputs are, and labels that are something else."""

import json

import pytest
from transformers import BertForSequenceClassification

from support.command_line import refused, run
from support.on_disk import reviews, save_classifier, tokenizer, write_json_lines

PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multilabel",
    None: "classification",
}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The folder of a tiny adapter with three outputs."""
    return save_classifier(tmp_path_factory.mktemp("three"), outputs=3)


@pytest.fixture
def arguments(three, tmp_path):
    """From a problem type and labels to arguments of a command."""

    def made(problem, label):
        base = tmp_path / "base"
        kind = {"num_labels": 3, "problem_type": problem}
        model = BertForSequenceClassification.from_pretrained(three.parent / "base", **kind)
        model.save_pretrained(base)
        tokenizer().save_pretrained(base)
        rows = [{"text": row["text"], "label": label} for row in reviews(4, 0)]
        data = write_json_lines(tmp_path / "rows.jsonl", rows)
        return (three, "--base", base, "--data", data)

    return made


def fitted(arguments, out):
    run("fit", *arguments, "--out", out, "--overwrite", "-q")
    return json.loads((out / "laplace_data.json").read_text())["likelihood"]


def test_lists_of_zeros_and_ones_are_what_the_configuration_says(arguments, tmp_path):
    for problem, expected in (("regression", "regression"), (None, "multilabel")):
        assert fitted(arguments(problem, [1.0, 1.0, 0.0]), tmp_path / "out") == expected


def test_classes_are_no_targets_of_a_regression(arguments, tmp_path):
    message = refused("fit", *arguments("regression", 2), "--out", tmp_path / "out")
    assert "row 1 has the label 2; expected a list of 3 numbers, the targets of a" in message
    assert "for classes say --likelihood classification" in message


@pytest.mark.parametrize("problem", [None, "single_label_classification"])
def test_numbers_that_are_no_labels_name_the_regression(arguments, tmp_path, problem):
    found = arguments(problem, [1.0, 0.5, 1.2])
    message = refused("fit", *found, "--out", tmp_path / "out")
    assert "row 1 has the label [1.0, 0.5, 1.2]" in message
    assert "say --likelihood regression" in message
    run("fit", *found, "--out", tmp_path / "out", "--likelihood", "regression", "-q")


@pytest.mark.parametrize("problem", PROBLEMS)
def test_doctor_without_data_takes_the_model_for_the_same(arguments, monkeypatch, problem):
    seen = []

    def new_posterior(adapter, plan, *args):
        seen.append(plan.likelihood)
        raise ValueError("enough")

    monkeypatch.setattr("laplace_lora.commands.examination.new_posterior", new_posterior)
    refused("doctor", *arguments(problem, 0)[:3])
    assert seen == [PROBLEMS[problem]]
