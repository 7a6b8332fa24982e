"""Refusals name the actual cause; what can be answered in its presence is answered."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.capture import padding
from support.batches import loader, token_batch
from support.models import adapter_config, base_model, excite, peft_model
from support.posteriors import fitted, posterior
from support.references import assert_near

BATCH = token_batch((6, 3, 5))
BOTH = pytest.mark.parametrize("uncovered", ["error", "diag"])


def test_inference_mode_around_calls_changes_nothing():
    la = posterior(name="bert")
    expected = la(BATCH), la.predict(BATCH).probs
    with torch.inference_mode():
        batch = token_batch((6, 3, 5))
        found = la(batch), la.predict(batch).probs
    assert_near(found, expected, 0)
    assert_near(la(batch), expected[0], 0)


def test_weights_made_in_inference_mode_are_named_and_a_copy_goes_on():
    with torch.inference_mode():
        base = base_model("bert")
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["query"]))
    with pytest.raises(RuntimeError, match=r"made in torch\.inference_mode.*copy\.deepcopy"):
        KronLoraLaplace(model, "classification").fit(loader())
    KronLoraLaplace(copy.deepcopy(model), "classification").fit(loader())


@BOTH
def test_frozen_weights_are_named(uncovered):
    la = posterior(name="bert", uncovered=uncovered)
    expected = la(BATCH)
    la.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"lora_A.*were frozen after it was made"):
        la(BATCH)
    la.logits_model.model.set_adapter("default")
    assert_near(la(BATCH), expected, 0)


@BOTH
def test_another_active_adapter_is_named(uncovered):
    la = posterior(name="bert", uncovered=uncovered)
    expected, model = la(BATCH), la.logits_model.model
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    with pytest.raises(RuntimeError, match=r"an adapter that is not active.*set_adapter"):
        la(BATCH)
    model.set_adapter("default")
    assert_near(la(BATCH), expected, 0)


@BOTH
def test_an_unloaded_adapter_is_named(uncovered):
    la = posterior(name="bert", uncovered=uncovered)
    la.logits_model.model.unload()
    with pytest.raises(RuntimeError, match=r"no longer part of the model: its adapter was unload"):
        la(BATCH)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize("name,whole", [("bert", False), ("llama", True)])
def test_compiled_models_answer_as_they_did(name, whole):
    """Compiled code that ran before does not look for hooks."""
    la = posterior(name=name)
    model = la.logits_model.model.eval()
    inputs = {key: value for key, value in BATCH.items() if key != "labels"}
    expected = la(BATCH)
    layers = [m for m in model.modules() if type(m).__name__ in ("BertLayer", "LlamaDecoderLayer")]
    for module in [model] if whole else layers:
        module.compile(backend="eager")
    model(**inputs)
    compiled = [module._compiled_call_impl for module in model.modules()]
    assert_near(la(BATCH), expected, 1e-12)
    assert [module._compiled_call_impl for module in model.modules()] == compiled


def test_a_compiled_wrapper_is_looked_through():
    """The transformer's kind must be seen: this head is run at one token."""
    expected = posterior(name="llama")(BATCH)
    la = KronLoraLaplace(torch.compile(peft_model("llama"), backend="eager"), "classification")
    la.fit(loader())
    assert_near(la(BATCH), expected, 1e-12)


def test_a_base_model_compiled_before_peft_is_looked_through():
    expected = posterior(name="llama")(BATCH)
    base = torch.compile(base_model("llama"), backend="eager")
    model = excite(get_peft_model(base, adapter_config("llama"))).double()
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    assert_near(la(BATCH), expected, 1e-12)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
def test_a_forward_pass_that_was_compiled_by_itself_answers_as_it_did():
    expected = posterior(name="llama")(BATCH)
    model = peft_model("llama").eval()
    inner = model.get_base_model().model
    compiled = inner.forward = torch.compile(inner.forward, backend="eager")
    model(**{key: value for key, value in BATCH.items() if key != "labels"})
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    assert_near(la(BATCH), expected, 1e-12)
    assert inner.forward is compiled


def speech():
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        conv_dim=(8, 8),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        feat_extract_norm="layer",
        num_labels=3,
    )
    base = Wav2Vec2ForSequenceClassification(config)
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    return excite(get_peft_model(base, lora)).double()


def waves():
    noise = torch.randn(4, 400, generator=torch.Generator().manual_seed(0)).double()
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[1, 250:] = 0
    labels = torch.arange(4) % 3
    rows = zip(noise * mask, mask, labels, strict=True)
    return [{"input_values": x, "attention_mask": m, "labels": y} for x, m, y in rows]


def test_masks_of_samples_become_masks_of_frames():
    """Speech models take a mask of samples, and their layers see frames: as many as they say."""
    model = speech()
    padded = KronLoraLaplace(model, "classification")
    padded.fit(DataLoader(waves(), batch_size=2))
    alone = KronLoraLaplace(model, "classification")
    cut = []
    for row in waves():
        length = int(row["attention_mask"].sum())
        cut.append({"input_values": row["input_values"][:length], "labels": row["labels"]})
    singles = DataLoader(cut, batch_size=1)
    alone.fit(singles)
    for one, other in zip(padded.curvature.kfacs, alone.curvature.kfacs, strict=True):
        assert_near([a.matrix for a in one], [b.matrix for b in other], 1e-9)
    batch = next(iter(DataLoader(waves(), batch_size=4)))
    assert_near(padded(batch)[1:2], alone(list(singles)[1]), 1e-9)


def test_masks_of_samples_that_no_model_explains_leave_layers_the_diagonal(tmp_path, monkeypatch):
    monkeypatch.setattr(padding, "frame_masks", lambda model: None)
    model, data = speech(), DataLoader(waves(), batch_size=2)
    with pytest.raises(RuntimeError, match=r"tokens per example.*Leave the mask out.*'diag'"):
        KronLoraLaplace(model, "classification").fit(data)
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    la.fit(data)
    exact = DiagLoraLaplace(model, "classification")
    exact.fit(data)
    frames = [i for i, name in enumerate(la.block_names) if "lora" in name]
    kept = [la.curvature.kfacs[i][0] for i in frames]
    slices = exact.curvature.split(exact.engine.sizes)
    assert_near([factor.sums for factor in kept], [slices[i] for i in frames])
    la.save_pretrained(tmp_path)
    batch = next(iter(data))
    assert_near(
        KronLoraLaplace.from_pretrained(model, tmp_path, uncovered="diag")(batch), la(batch)
    )


def test_fits_name_the_cause_as_well():
    la = fitted()
    la.model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="were frozen"):
        la.fit(loader())
