"""Encoder-decoders answer behind what their tokenizers write before a target."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, MBart50Tokenizer

from laplace_lora import KronLoraLaplace
from laplace_lora.commands.reading.adapter import load_adapter
from laplace_lora.commands.reading.decoder import read_before
from laplace_lora.commands.reading.plan import Plan
from laplace_lora.commands.reading.said import decoder_said
from support.command_line import refused, run
from support.on_disk import WORDS, reviews, save_encoder_decoder, write_json_lines

ANSWERS = ["bad", "good"]
WRITES = {"assistant $A [EOS]": [2, 12], "$A [EOS]": []}  # BART's way and T5's


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {w: save_encoder_decoder(tmp_path_factory.mktemp("bart"), w) for w in WRITES}


def nll(folder, before):
    """By a plain loop, behind what the decoder reads."""
    loaded = load_adapter(str(folder))
    losses, ids = [], [WORDS.index(answer) for answer in ANSWERS]
    for row in reviews(20, 2):
        x = loaded.tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            found = loaded.model(**x, decoder_input_ids=torch.tensor([before])).logits[0, -1, ids]
        losses.append(float(F.cross_entropy(found, torch.tensor(row["label"]))))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("writes", WRITES)
def test_answers_are_read_behind_what_the_tokenizer_writes(folders, data, tmp_path, writes):
    folder, out, before = folders[writes], tmp_path / "out", WRITES[writes]
    train = write_json_lines(tmp_path / "train.jsonl", reviews(8, 0))
    run("fit", folder, "--data", train, "--target", *ANSWERS, "--out", out, "-q")
    args, plan = (folder, "--posterior", out, "--data", data("test")), out / "laplace_data.json"
    content = json.loads(plan.read_text())
    assert content["decoder"] == before
    assert scored(*args, "--ood", train) == pytest.approx(nll(folder, before or [2]), rel=1e-5)
    run("predict", *args, "-q")
    # Files of earlier fits, which were all at the first step.
    plan.write_text(json.dumps({k: v for k, v in content.items() if k != "decoder"}))
    first = nll(folder, [2])
    assert scored(*args) == pytest.approx(first, rel=1e-5)
    assert abs(nll(folder, [2, 12]) - first) > 1e-3


def test_what_the_decoder_reads_before_an_answer_is_said(folders, tmp_path):
    train = write_json_lines(tmp_path / "train.jsonl", reviews(8, 0))
    asked = ("--data", train, "--target", *ANSWERS)
    for writes, said in (("assistant $A [EOS]", "'[EOS]', 'assistant'."), ("$A [EOS]", "")):
        fit = run("fit", folders[writes], *asked, "--out", tmp_path / writes[0]).stderr
        doctor = run("doctor", folders[writes], *asked).stdout
        for text in (fit, doctor):
            assert ("Before an answer the decoder reads" in text) == bool(said) and said in text
            assert "no target language" not in text


def test_a_target_language_that_nobody_has_named_is_pointed_out(tmp_path):
    words = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁good", -1.0)]
    tokenizer = MBart50Tokenizer(vocab=words)
    target = tokenizer(text_target="good")["input_ids"]
    plan = Plan("classification", decoder=[2, *target[:1]])
    said = decoder_said(plan, tokenizer)
    assert said.startswith(
        "Before an answer the decoder reads '</s>', 'en_XX'. The tokenizer names"
    )
    assert said.endswith("save its tokenizer with the adapter.")
    tokenizer.tgt_lang = "en_XX"
    tokenizer.save_pretrained(tmp_path)
    named = AutoTokenizer.from_pretrained(tmp_path)
    assert decoder_said(plan, named) == "Before an answer the decoder reads '</s>', 'en_XX'."
    assert decoder_said(Plan("classification"), tokenizer) is None


def scored(*args):
    """Return the NLL of the adapter alone, as the command has it."""
    return json.loads(run("evaluate", *args, "--out", "-", "-q").stdout)[0]["values"]["NLL"]


def test_a_posterior_from_python_does_not_say_where_it_reads(folders, data, tmp_path):
    for writes, folder in folders.items():
        loaded, out = load_adapter(str(folder)), tmp_path / str(len(writes))
        ids = [WORDS.index(answer) for answer in ANSWERS]
        la = KronLoraLaplace(loaded.model, "classification", target_ids=ids)
        rows = [{**loaded.tokenizer("the film"), "labels": 0}] * 2
        la.fit(DataLoader(rows, 2, collate_fn=partial(loaded.tokenizer.pad, return_tensors="pt")))
        la.save_pretrained(out)
        args = ("predict", folder, "--posterior", out, "--data", data("test"))
        if WRITES[writes]:
            assert "what the decoder reads before an answer" in refused(*args)
        else:
            run(*args, "-q")


def test_the_model_s_own_way_from_targets_to_inputs_is_taken(folders):
    """As mBART's, which puts the target's last token first."""
    loaded = load_adapter(str(folders["assistant $A [EOS]"]))
    ids, base = [WORDS.index(answer) for answer in ANSWERS], loaded.model.get_base_model()
    base.prepare_decoder_input_ids_from_labels = lambda labels: labels.roll(1, -1)
    assert read_before(loaded, ANSWERS, ids) == [2, 12]
    base.prepare_decoder_input_ids_from_labels = lambda labels: labels.roll(1, -1) + 1
    assert read_before(loaded, ANSWERS, ids) == [3, 13]


def test_a_model_s_own_way_needs_no_start(folders, monkeypatch):
    """As mBART's, whose configuration names none."""
    loaded = load_adapter(str(folders["assistant $A [EOS]"]))
    ids, base = [WORDS.index(answer) for answer in ANSWERS], loaded.model.get_base_model()
    for config in (base.config, base.generation_config):
        monkeypatch.setattr(config, "decoder_start_token_id", None)
    base.prepare_decoder_input_ids_from_labels = lambda labels: labels.roll(1, -1)
    assert read_before(loaded, ANSWERS, ids) == [2, 12]

    def needs_start(labels):
        raise ValueError("decoder_start_token_id has to be defined")

    base.prepare_decoder_input_ids_from_labels = needs_start
    assert read_before(loaded, ANSWERS, ids) == []


class Odd:
    """A tokenizer that reads targets by a vocabulary of their own, or begins them by their sort."""

    eos_token_id = 2

    def __init__(self, targets):
        self.targets = targets

    def __call__(self, text_target):
        return {"input_ids": self.targets[text_target]}

    def convert_ids_to_tokens(self, ids):
        return WORDS[ids] if isinstance(ids, int) else [WORDS[i] for i in ids]


def test_targets_that_cannot_be_compared_are_refused(folders):
    loaded = load_adapter(str(folders["$A [EOS]"]))
    for targets, message in (
        ({"bad": [7, 2], "good": [3, 2]}, "is the token 'bad' alone, but"),
        ({"bad": [5, 2], "good": [11, 3, 2]}, r"writes \[\] before 'bad', and \['user'\] before"),
    ):
        odd = replace(loaded, tokenizer=Odd(targets))
        with pytest.raises(ValueError, match=message):
            read_before(odd, ANSWERS, [5, 3])
