"""Adapters and base models that do not make a whole model are refused."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    FlaubertForSequenceClassification,
    FunnelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    XLMForSequenceClassification,
    XLNetForSequenceClassification,
)

from laplace_lora.commands.reading.adapter import HEAD, load_adapter
from laplace_lora.commands.reading.four_bits import unquantised
from laplace_lora.commands.reading.repository import file_of
from support.command_line import refused, run
from support.hub import serving
from support.on_disk import SIZES, reviews, save_classifier, tokenizer
from support.sweeps import rest_slow


def changed(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def saved(folder, base, target, words=None, modules_to_save=None, **config):
    """Save a base model with its head, and an adapter; return the latter's folder."""
    base.save_pretrained(folder / "base")
    (words or tokenizer()).save_pretrained(folder / "base")
    base = type(base).from_pretrained(folder / "base", **config, ignore_mismatched_sizes=True)
    lora = LoraConfig(
        task_type="SEQ_CLS", r=2, target_modules=[target], modules_to_save=modules_to_save
    )
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    return folder / "adapter"


def test_the_number_of_classes_is_the_saved_head_s(tmp_path):
    loaded = load_adapter(str(save_classifier(tmp_path, outputs=3)), device="cpu")
    assert loaded.kind == HEAD and loaded.outputs == 3 and loaded.names == []
    assert loaded.max_length == 24 and loaded.model.config.num_labels == 3


def test_the_layer_before_the_head_does_not_count_the_classes(tmp_path):
    sizes = {"dim": 16, "hidden_dim": 32, "n_layers": 1, "n_heads": 2}
    config = DistilBertConfig(**sizes, vocab_size=SIZES["vocab_size"], num_labels=3)
    loaded = load_adapter(
        str(saved(tmp_path, DistilBertForSequenceClassification(config), "q_lin")), device="cpu"
    )
    assert loaded.outputs == 3


LAST = {  # of models that do not call their last layer by the usual names
    XLNetForSequenceClassification: (
        {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16},
        "layer_1",
        ["sequence_summary", "logits_proj"],
    ),
    FunnelForSequenceClassification: (
        {"block_sizes": [1, 1], "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16},
        "q_head",
        None,
    ),
    FlaubertForSequenceClassification: (
        {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0},
        "q_lin",
        ["sequence_summary"],
    ),
    XLMForSequenceClassification: (
        {"emb_dim": 16, "n_layers": 1, "n_heads": 2, "pad_index": 0},
        "q_lin",
        ["sequence_summary"],
    ),
}


@pytest.mark.parametrize("kind", LAST, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("outputs", [2, 3])
def test_the_last_layer_may_have_a_name_of_its_own(tmp_path, kind, outputs):
    sizes, target, whole = LAST[kind]
    config = kind.config_class(vocab_size=SIZES["vocab_size"], **sizes)
    folder = saved(tmp_path, kind(config), target, modules_to_save=whole, num_labels=outputs)
    loaded = load_adapter(str(folder), device="cpu")
    batch = tokenizer()(["the film was good"], return_tensors="pt")
    logits = loaded.model(**batch).logits
    assert loaded.outputs == outputs and logits.shape == (1, outputs)


@pytest.mark.parametrize(("side", "expected"), [("right", 0), ("left", 1)])
def test_a_decoder_s_head_looks_for_the_padding_of_its_tokenizer(tmp_path, side, expected):
    config = LlamaConfig(**{**SIZES, "pad_token_id": 1})
    words = tokenizer()
    words.init_kwargs["padding_side"] = words.padding_side = side
    folder = saved(tmp_path, LlamaForSequenceClassification(config), "q_proj", words)
    assert load_adapter(str(folder), device="cpu").model.config.pad_token_id == expected


def test_the_base_model_s_own_head_and_names(adapter, tmp_path):
    folder, base = adapter(), tmp_path / "with-head"
    names = {0: "poor", 1: "great"}
    config = BertConfig(**SIZES, num_labels=2, id2label=names)
    BertForSequenceClassification(config).save_pretrained(base)
    tokenizer().save_pretrained(base)
    loaded = load_adapter(str(folder), base=str(base), device="cpu")
    assert loaded.names == ["poor", "great"]


def test_a_head_that_nobody_saved_is_refused(tmp_path, data):
    folder = save_classifier(tmp_path)
    weights = folder / "adapter_model.safetensors"
    from safetensors.torch import load_file, save_file

    kept = {k: v for k, v in load_file(weights).items() if "classifier" not in k}
    save_file(kept, weights)
    message = refused("fit", folder, "--data", data("train"))
    assert "classifier.bias, classifier.weight are neither in" in message
    assert "would be random" in message


def test_another_base_model_is_refused(adapter, tmp_path, data):
    folder, base = adapter(), tmp_path / "other"
    BertModel(BertConfig(**{**SIZES, "hidden_size": 8})).save_pretrained(base)
    tokenizer().save_pretrained(base)
    message = refused("fit", folder, "--data", data("train"), "--base", base)
    assert "does not fit the base model" in message
    torch.manual_seed(5)
    same = tmp_path / "same-shape"
    BertModel(BertConfig(**SIZES)).save_pretrained(same)
    tokenizer().save_pretrained(same)
    run("fit", folder, "--data", data("train"), "-q")
    message = refused("predict", folder, "--data", data("test"), "--base", same)
    assert "the base model differs" in message


def test_a_base_model_that_moved(posterior, tmp_path, data):
    folder = posterior("classifier", data("train"))
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    moved = shutil.copytree(base, tmp_path / "moved")
    changed(folder, base_model_name_or_path=None)
    assert "give it by --base" in refused("predict", folder, "--data", data("test"))
    run("predict", folder, "--data", data("test"), "--base", moved, "-q")


def test_what_is_no_adapter(tmp_path, adapter, data):
    assert "has no adapter_config.json" in refused("fit", tmp_path, "--data", data("train"))
    other = changed(adapter(), task_type="QUESTION_ANS")
    assert "an adapter for QUESTION_ANS" in refused("fit", other, "--data", data("train"))
    nameless = changed(other, task_type=None, auto_mapping=None)
    assert "an unnamed task" in refused("fit", nameless, "--data", data("train"))
    foreign = {"base_model_class": "XForSequenceClassification", "parent_library": "os"}
    evil = changed(other, auto_mapping=foreign)
    assert "takes SEQ_CLS" in refused("fit", evil, "--data", data("train"))


def test_an_adapter_without_a_task_names_its_class(adapter, data):
    library = "transformers.models.bert.modeling_bert"
    mapping = {"base_model_class": "BertForSequenceClassification", "parent_library": library}
    folder = changed(adapter(), task_type=None, auto_mapping=mapping)
    run("fit", folder, "--data", data("train"), "-q")


def test_the_adapter_s_own_tokenizer_wins(adapter, data, tmp_path):
    folder = adapter()
    words = tokenizer()
    words.model_max_length = 5
    words.save_pretrained(folder)
    assert load_adapter(str(folder), device="cpu").max_length == 5


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(adapter):
    folder = adapter()
    words = tokenizer()
    words.add_tokens(["entirely", "new"])
    words.save_pretrained(folder)
    with pytest.raises(ValueError, match="18 tokens, the base model 16"):
        load_adapter(str(folder), device="cpu")


def test_a_tokenizer_without_padding_pads_with_its_end(made, adapter, tmp_path):
    folder = adapter()
    words = tokenizer()
    words.pad_token = None
    words.save_pretrained(folder)
    assert load_adapter(str(folder), device="cpu").tokenizer.pad_token == "[EOS]"
    words.eos_token = None
    words.save_pretrained(folder)
    with pytest.raises(ValueError, match="neither a padding nor an ending token"):
        load_adapter(str(folder), device="cpu")


def test_four_bits(adapter, data, monkeypatch):
    pytest.importorskip("bitsandbytes")
    folder = adapter("decoder")
    rows = data("train", lambda row: {"prompt": row["text"], "label": row["label"]})
    args = ["--data", rows, "--target", "bad", "good", "--load-in-4bit", "--device", "cpu", "-q"]
    run("fit", folder, *args)
    run("predict", folder, "--data", rows, "--device", "cpu", "-q")  # in four bits again
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    assert "pip install bitsandbytes" in refused("fit", folder, *args, "--overwrite")


@pytest.mark.parametrize("kind", rest_slow(["classifier", "one output"], 0))
def test_a_head_that_the_adapter_saves_is_not_quantised(adapter, data, kind):
    """transformers leaves what the last tensor is called, for BERT ``classifier.bias``."""
    pytest.importorskip("bitsandbytes")
    folder = adapter(kind)
    args = ("--data", data("train"), "--device", "cpu", "-q")
    run("fit", folder, *args, "--load-in-4bit")
    assert len(run("predict", folder, *args).stdout.splitlines()) == 48


def test_four_bits_leave_what_is_saved_and_what_transformers_leaves(made):
    base = str(made("decoder").parent / "base")
    auto = transformers.AutoModelForCausalLM
    assert unquantised(None, auto, base) is None
    for loader in (auto, transformers.LlamaForCausalLM):
        found = unquantised(["gate_proj"], loader, base)
        assert found == ["lm_head", *(f"model.layers.{i}.mlp.gate_proj" for i in range(2))]
    head = transformers.AutoModelForSequenceClassification
    found = unquantised(["classifier", "score"], head, str(made("classifier").parent / "base"))
    assert "classifier" in found and not any("encoder" in name for name in found)


def test_adapters_and_posteriors_on_the_hub(adapter, data, tmp_path, monkeypatch):
    folder = adapter()
    words = tokenizer()
    words.model_max_length = 9
    words.save_pretrained(folder)
    run("fit", folder, "--data", data("train"), "--labels", "bad", "good", "-q")
    expected = run("predict", folder, "--data", data("test"), "-q").stdout
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.create("me/adapter")
        hub.files["me/adapter"] = {p.name: p.read_bytes() for p in folder.iterdir()}
        assert load_adapter("me/adapter", device="cpu").max_length == 9
        assert run("predict", "me/adapter", "--data", data("test"), "-q").stdout == expected
        assert "KronLoraLaplace" in run("info", "me/adapter").stdout
        del hub.files["me/adapter"]["laplace_data.json"]
    with serving(monkeypatch, tmp_path / "other-cache") as other:
        other.create("me/adapter")
        other.files["me/adapter"] = hub.files["me/adapter"]
        result = run("predict", "me/adapter", "--data", data("test"), "-q")
        assert '"probabilities": {"0": ' in result.stdout


def test_a_file_that_may_be_on_a_hub_that_is_not_reached_is_not_taken_for_missing(
    tmp_path, monkeypatch
):
    with serving(monkeypatch, tmp_path / "cache") as hub:
        hub.create("me/adapter")
        hub.files["me/adapter"] = {"here.json": b"{}"}
        assert file_of("me/adapter", "here.json").read_bytes() == b"{}"
        assert file_of("me/adapter", "gone.json") is None
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert file_of("me/adapter", "here.json").read_bytes() == b"{}"
    with pytest.raises(FileNotFoundError, match=r"repository me/adapter may have a plan\.json"):
        file_of("me/adapter", "plan.json")
    known = huggingface_hub._CACHED_NO_EXIST
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: known)
    assert file_of("me/adapter", "plan.json") is None


def test_a_device_that_is_not_there_is_named(made, data):
    args = ("doctor", made("classifier"), "--data", data("train"), "--device", "nonsense")
    assert "--device nonsense: torch finds no such device here" in refused(*args)


def test_a_repository_that_cannot_be_reached_is_named(data, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's five tries
    args = ("--data", data("train"), "--out", tmp_path / "out")
    assert "no folder me/nothing" in refused("fit", "me/nothing", *args)
    assert "no folder me/nothing" in refused("predict", "me/nothing", "--data", data("train"))


def test_the_dtype_of_the_base(adapter):
    loaded = load_adapter(str(adapter()), device="cpu", dtype="bfloat16")
    dtypes = {n: p.dtype for n, p in loaded.model.named_parameters() if p.ndim == 2}
    assert {t for n, t in dtypes.items() if "lora" not in n and "classifier" not in n} == {
        torch.bfloat16
    }
    assert len(reviews(3, 0)) == 3
