"""Saved posteriors come back with every setting, and failed saves lose nothing."""

import copy

import pytest
import torch
from peft import PeftModel

from laplace_lora import KronLoraLaplace, LogitsModel, LoraEF, LoraGGN
from laplace_lora.storage.files import CONFIG, TENSORS
from support.batches import loader, token_batch
from support.models import TARGETS, adalora_model, base_model, peft_model
from support.posteriors import EVERY_CLASS, LOW, fitted
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_a_posterior_comes_back_bit_for_bit(cls, kwargs, tmp_path):
    la = fitted(cls, **kwargs)
    la.calibrate(loader())
    before = la(BATCH)
    la.save_pretrained(tmp_path / "new" / "folder", precision="exact")
    assert {p.name for p in (tmp_path / "new" / "folder").iterdir()} == {TENSORS, CONFIG}
    again = cls.from_pretrained(la.logits_model.model, tmp_path / "new" / "folder")
    assert torch.equal(again(BATCH), before)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())
    assert torch.equal(again.prior_precision, la.prior_precision)
    assert again.arguments() == la.arguments()
    again.optimize_prior_precision(prior_structure="scalar", train_loader=loader())
    again.fit(loader(), override=False)
    assert again.n_data == 2 * la.n_data


def test_every_setting_comes_back(tmp_path):
    model = peft_model("llama-lm")
    la = KronLoraLaplace(
        model,
        "classification",
        target_ids=TARGETS,
        modules=["q_proj"],
        backend=LoraEF,
        backend_kwargs={"kfac_approx": "reduce"},
        temperature=0.7,
        prior_mean=0.1,
        **LOW,
    )
    la.fit(loader())
    la.prior_precision = torch.linspace(1, 2, la.n_layers)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert type(again.backend) is LoraEF and again.engine.rows.approximation == "reduce"
    assert again.n_params == la.n_params and again.temperature == 0.7
    assert again.prior_mean.item() == la.prior_mean.item() == 0.1


def test_regression_comes_back(tmp_path):
    la = KronLoraLaplace(peft_model("bert"), "regression", sigma_noise=0.5)
    la.fit(loader(likelihood="regression"))
    la.optimize_prior_precision(tune_sigma_noise=True)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    for ours, theirs in zip(again(BATCH), la(BATCH), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(again.log_marginal_likelihood(), la.log_marginal_likelihood())


@pytest.mark.parametrize("kind", [peft_model, adalora_model])
def test_a_posterior_finds_its_adapter_loaded_from_disk(kind, tmp_path):
    model = kind("bert", dtype=torch.float32)
    la = fitted(model=model)
    before = la(BATCH)
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")
    loaded = PeftModel.from_pretrained(base_model("bert"), tmp_path)
    again = KronLoraLaplace.from_pretrained(loaded, tmp_path)
    assert_near(again(BATCH), before)


def test_another_adapter_beside_it_does_no_harm(tmp_path):
    model = peft_model("bert", dtype=torch.float32, modules_to_save=None)
    la = fitted(model=model)
    la.save_pretrained(tmp_path, precision="exact")
    config = copy.deepcopy(model.peft_config["default"])
    model.add_adapter("other", config)
    model.set_adapter("default")
    again = KronLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    model.set_adapter("other")
    with pytest.raises(ValueError, match="the weights are not those"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_what_a_file_cannot_hold_is_refused(tmp_path):
    class Mine(LoraGGN):
        pass

    la = fitted(backend=Mine)
    with pytest.raises(TypeError, match="the backend Mine cannot be saved"):
        la.save_pretrained(tmp_path, precision="exact")
    with pytest.raises(AttributeError, match="not fitted"):
        KronLoraLaplace(peft_model("bert"), "classification").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model = peft_model("bert")
    la = fitted(model=LogitsModel(model, output=lambda out: 2 * out.logits))
    la.save_pretrained(tmp_path, precision="exact")
    with pytest.raises(ValueError, match="LogitsModel with an `output` callable"):
        KronLoraLaplace.from_pretrained(model, tmp_path)
    again = KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))


@pytest.mark.parametrize("name", ["prior_precision", "backend", "likelihood", "dict_key_y"])
def test_options_that_the_file_decides_about_are_refused(name, tmp_path):
    la = fitted()
    la.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"'{name}' is restored from the file"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path, **{name: 3.0})
    with pytest.raises(TypeError, match="KronLoraLaplace has no option 'storage'"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path, storage="cpu")


def test_missing_files_are_named(tmp_path):
    la = fitted()
    with pytest.raises(FileNotFoundError, match=r"laplace\.safetensors is missing"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a folder nor"):
        KronLoraLaplace.from_pretrained(la.logits_model, tmp_path / "nowhere")


def test_a_failed_save_leaves_the_earlier_one(tmp_path, monkeypatch):
    la = fitted()
    la.save_pretrained(tmp_path, precision="exact")
    content = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr("os.fsync", lambda handle: (_ for _ in ()).throw(OSError("disk full")))
    la.prior_precision = 3.0
    with pytest.raises(OSError, match="disk full"):
        la.save_pretrained(tmp_path, precision="exact")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == content
