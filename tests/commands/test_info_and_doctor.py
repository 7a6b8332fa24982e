"""What a posterior is, and what a fit will do."""

import json
import re

import torch
from peft import LoraConfig, get_peft_model
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

from laplace_lora.commands.description import _memory
from laplace_lora.commands.entry import main
from laplace_lora.storage.files import TENSORS, read_files
from support.command_line import refused, run
from support.on_disk import SIZES, reviews, save_classifier, tokenizer, write_json_lines


def test_info_says_what_the_files_hold(posterior, data):
    folder = posterior("classifier", data("train"), "--val", data("val"))
    content = json.loads(run("info", folder, "--json").stdout)
    assert content["posterior"]["class"] == "KronLoraLaplace"
    assert content["posterior"]["examples"] == 48 and content["covers"]["tensors"] == 10
    assert content["covers"]["weights"] == 290
    assert content["size"]["file, MiB"] == (folder / TENSORS).stat().st_size / 2**20
    # Factors and their eigenvectors, in single precision: two squares of each side.
    shapes = [v.split(" x ") for k, v in content["covers"].items() if "." in k]
    numbers = sum(2 * int(side) ** 2 for shape in shapes for side in shape)
    assert content["size"]["memory when loaded, about, MiB"] == 4 * numbers / 2**20
    _, config = read_files(folder)
    names = ("weights", "adapter", "base", "base_in_use", "buffers", "adapter_settings")
    assert content["fingerprints"] == {name: config[name] for name in names}
    assert all(len(number) == 64 for number in content["fingerprints"].values())
    assert content["data"]["columns"]["text"] == "text"
    shown = run("info", folder).stdout
    assert content["fingerprints"]["weights"][:12] in shown
    assert content["fingerprints"]["weights"] not in shown and "KronLoraLaplace" in shown
    assert "query.lora_A" in shown and "base_model.model" not in shown
    assert "columns, text" in shown and "'0', '1'" in shown and "observation noise" not in shown


def test_vectors_are_part_of_the_memory(tmp_path, data):
    """How often each word was read, and diagonals of whole tensors."""
    modules = {
        "target_modules": ["word_embeddings"],
        "modules_to_save": ["classifier", "LayerNorm"],
    }
    folder = save_classifier(tmp_path, **modules)
    run("fit", folder, "--data", data("train"), "--uncovered", "diag", "-q")
    content, numbers = json.loads(run("info", folder, "--json").stdout), 0
    for name, shape in content["covers"].items():
        sides = [int(side) for side in str(shape).split(" x ")]
        if "lora_embedding_A" in name:
            rank, words = sides
            numbers += 2 * rank**2 + words
        elif "LayerNorm" in name:
            numbers += sides[0]
        elif "." in name:
            numbers += sum(2 * side**2 for side in sides)
    assert content["size"]["memory when loaded, about, MiB"] == 4 * numbers / 2**20
    spec = {"factor_rank": 8, "low_rank_threshold": 512, "residual": "isotropic"}
    config = {"arguments": spec, "parameters": {"weight": [2, 16]}, "curvature": [[0]]}
    assert _memory(config, {"curvature.0.diagonal": torch.zeros(32)}) == 4 * 32


def test_info_of_a_regression_has_its_noise(posterior, data):
    folder = posterior("one output", data("train"))
    content = json.loads(run("info", folder, "--json").stdout)
    assert content["prior and calibration"]["observation noise"] > 0


def test_tensors_that_layers_have_alike_are_counted(posterior, data, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    folder = posterior("classifier", data("train"))
    for command in ("info", "doctor"):
        text = run(command, folder).stdout
        (line,) = [line for line in text.splitlines() if "query.lora_A" in line]
        cells = re.split("[│,]", line)
        name = "bert.encoder.layer.*.attention.self.query.lora_A.weight"
        assert [cell.strip() for cell in cells[1:4]] == [name, "2 x 16", "2"]


def test_info_checks_the_files(adapter, data):
    folder = adapter()
    assert "is missing" in refused("info", folder)
    run("fit", folder, "--data", data("train"), "-q")
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:-8])
    assert "altered, truncated" in refused("info", folder)


def test_doctor_of_a_model_alone(made):
    result = run("doctor", made("classifier"))
    assert "290 weights are covered" in result.stdout and "Kronecker factors" in result.stdout
    assert "Give --data" in result.stdout and "expected to succeed" in result.stdout
    assert "Kronecker factors" in run("doctor", made("decoder")).stdout
    assert run("doctor", made("decoder"), "--target", "good", "bad").exit_code == 0
    assert "needs" in refused("doctor", made("decoder"), "--target", "good")


def test_doctor_refuses_without_data_what_a_fit_refuses(made, data):
    cases = {
        ("classifier", "--labels", "a", "b", "c"): "names 3 classes, the model has 2",
        ("decoder", "--likelihood", "classification"): "name the answers by --target",
        ("one output", "--likelihood", "classification"): "possible: multilabel, regression",
        ("classifier", "--chat"): "the tokenizer has no chat template",
        ("one output", "--labels-as", "names"): "has no classes to tell apart",
    }
    for (kind, *args), message in cases.items():
        assert message in refused("doctor", made(kind), *args)
        assert message in refused("fit", made(kind), "--data", data("train"), *args)


def test_doctor_takes_the_options_of_a_fit_that_it_says():
    taken = {
        name: {o for p in main.commands[name].params for o in p.opts} for name in main.commands
    }
    others = {"--val", "--out", "--overwrite", "--seed"}
    assert taken["fit"] - taken["doctor"] == others and taken["doctor"] < taken["fit"]
    said = " ".join(run("doctor", "--help").stdout.split())
    assert "options of `fit`, but for --val, --out, --overwrite and --seed" in said


def test_doctor_says_by_which_posterior_weights_are_covered(made):
    for structure, by in (("full", "exact curvature"), ("diag", "diagonal")):
        shown = run("doctor", made("classifier"), "--structure", structure).stdout
        assert by in shown and "Kronecker factors" not in shown


def test_doctor_of_a_fit_writes_nothing(made, data):
    before = {p.name for p in made("classifier").iterdir()}
    args = ("doctor", made("classifier"), "--data", data("train"))
    result = run(*args, "--structure", "full")
    assert "A fit of 48 rows in 6 batches takes about" in result.stdout
    assert "Reads 'text' and label 'label'; 'id' is not read." in result.stdout
    assert "activations" in result.stdout and "available" in result.stdout
    assert {p.name for p in made("classifier").iterdir()} == before


def test_doctor_names_what_is_not_covered(tmp_path, data):
    folder = save_classifier(tmp_path, modules_to_save=["classifier", "LayerNorm"])
    result = run("doctor", folder, "--data", data("train"), status=1)
    assert "Problem: K-FAC covers none of" in result.stdout
    assert "LayerNorm" in result.stdout and "--uncovered diag" in result.stdout
    assert "uncovered" in refused("fit", folder, "--data", data("train"))
    result = run("doctor", folder, "--data", data("train"), "--uncovered", "diag")
    assert "diagonal" in result.stdout and "expected to succeed" in result.stdout
    run("fit", folder, "--data", data("train"), "--uncovered", "diag", "-q")


def test_doctor_finds_what_only_a_batch_shows(tmp_path):
    """Relative attention runs a projection twice, with inputs of other shapes."""
    words, base, folder = tokenizer(), tmp_path / "base", tmp_path / "adapter"
    relative = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
    config = DebertaV2Config(**SIZES, type_vocab_size=0, share_att_key=True, **relative)
    DebertaV2ForSequenceClassification(config).save_pretrained(base)
    words.save_pretrained(base)
    model = DebertaV2ForSequenceClassification.from_pretrained(base)
    modules = ["query_proj", "value_proj"]
    get_peft_model(model, LoraConfig("SEQ_CLS", r=2, target_modules=modules)).save_pretrained(
        folder
    )
    data = write_json_lines(tmp_path / "rows.jsonl", reviews(6, 0))
    alone = run("doctor", folder).stdout
    assert "expected to succeed, as far as can be seen without data" in alone
    shown = run("doctor", folder, "--data", data, status=1).stdout
    assert "Problem: K-FAC covers none of" in shown and "query_proj.lora_A" in shown
    assert "value_proj" not in shown.partition("Problem")[2]
    message = refused("fit", folder, "--data", data)
    assert "--uncovered diag" in message and "uncovered='diag'" not in message
    shown = run("doctor", folder, "--data", data, "--uncovered", "diag").stdout
    assert "These data need a diagonal for" in shown and "query_proj.lora_A" in shown
    assert shown.rstrip().endswith("A fit is expected to succeed.")


def test_doctor_says_when_memory_is_short(made, data, monkeypatch):
    monkeypatch.setattr("laplace_lora.structures.sizes.available", lambda device: 1000)
    result = run("doctor", made("classifier"), "--data", data("train"), status=1)
    assert "Problem: batch of 8" in result.stdout and "too large" in result.stdout


def test_doctor_refuses_data_as_a_fit_does(made, data):
    unlabelled = data("train", lambda row: {"text": row["text"]})
    message = refused("doctor", made("classifier"), "--data", unlabelled)
    assert "no column for the label" in message


def test_doctor_warns_as_a_fit_does(made, data, monkeypatch):
    found = "laplace_lora.commands.training_warnings.prompts_with_space"
    monkeypatch.setattr(found, lambda prompts, *_: 1)
    args = ("doctor", made("decoder"), "--data", data("train"), "--target", "bad", "good")
    assert "Warning: 1 of 48 prompts end in a space" in run(*args).stderr
