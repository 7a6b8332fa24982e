"""An adapter may be loaded under another name than that of the fit, and is recognised by the rest.

PEFT's `from_pretrained` calls each adapter ``default`` unless told otherwise.
"""

import copy

import pytest
import torch
from peft import (
    FourierFTConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.adapters.plain_names import named_as, plain_names
from laplace_lora.posteriors.card import loading_code
from laplace_lora.storage.identity import identity
from support.batches import loader, token_batch
from support.models import TARGETS, base_model, excite

BATCH = token_batch((4, 2, 5), seed=3)
HEAD = {"target_modules": ["query"], "modules_to_save": ["classifier"]}
KINDS = {
    "LoRA and a head": ("bert", LoraConfig(r=2, **HEAD)),
    "some tokens": ("bert", LoraConfig(r=2, **HEAD, trainable_token_indices=[1, 2])),
    "tokens alone": ("llama-lm", TrainableTokensConfig(token_indices=[1, 2])),
    "VeRA": ("bert", VeraConfig(r=4, target_modules=["query"])),
    "FourierFT": ("bert", FourierFTConfig(n_frequency=8, target_modules=["query"])),
    "prompts": ("bert", PromptTuningConfig("SEQ_CLS", num_virtual_tokens=2)),
}
CASES = [pytest.param(*case, id=name) for name, case in KINDS.items()]


def adapted(name, config, adapter, seed=0):
    torch.manual_seed(seed)
    model = get_peft_model(base_model(name), copy.deepcopy(config), adapter_name=adapter)
    return excite(model).double().eval()


def posterior(name, model, fit=True, kind=DiagLoraLaplace):
    ids = TARGETS if name.endswith("-lm") else None
    la = kind(model, "classification", target_ids=ids, uncovered="diag")
    if fit:
        la.fit(loader())
    return la


@pytest.mark.parametrize("name,config", CASES)
@pytest.mark.parametrize(
    "then,now", [("mood", "default"), ("default", "lora_A"), ("query", "mood")]
)
def test_a_file_loads_under_any_name(name, config, then, now, tmp_path):
    la = posterior(name, adapted(name, config, then))
    la.save_pretrained(tmp_path, precision="exact")
    model = adapted(name, config, now)
    again = DiagLoraLaplace.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert all(f".{now}" in parameter for parameter in again.parts.engine.names)
    found, expected = identity(again.parts), identity(la.parts)
    assert found != expected
    with named_as(expected["parameters"]):
        assert identity(again.parts) == expected
    again.fit(loader(), override=False)
    again.save_pretrained(tmp_path)
    DiagLoraLaplace.from_pretrained(adapted(name, config, then), tmp_path)


@pytest.mark.parametrize("adapter", ["query", "attention", "lora_A", "base_layer", "encoder"])
def test_an_adapter_may_be_called_like_a_module(adapter):
    model = adapted("bert", KINDS["LoRA and a head"][1], adapter)
    expected = dict(adapted("bert", KINDS["LoRA and a head"][1], "mood").named_parameters())
    with named_as(expected):
        name_of = plain_names(model)
    assert [name_of(name) for name, _ in model.named_parameters()] == list(expected)


@pytest.mark.parametrize("idle", ["mood", "other"])
def test_a_second_adapter_is_recognised_by_its_weights(idle, tmp_path):
    """Beside one of the fit's name or another, and not that one itself."""
    config = KINDS["LoRA and a head"][1]
    la = posterior("bert", adapted("bert", config, "mood"), kind=KronLoraLaplace)
    la.save_pretrained(tmp_path / "la", precision="exact")
    la.logits_model.model.save_pretrained(tmp_path)
    model = get_peft_model(base_model("bert"), copy.deepcopy(config), adapter_name=idle)
    model.load_adapter(tmp_path / "mood", "own", is_trainable=True)
    model = model.double().eval()
    model.set_adapter("own")
    again = KronLoraLaplace.from_pretrained(model, tmp_path / "la")
    torch.testing.assert_close(again(BATCH), la(BATCH))
    model.set_adapter(idle)
    with pytest.raises(ValueError, match="the weights are not those"):
        KronLoraLaplace.from_pretrained(model, tmp_path / "la")


def test_other_weights_and_other_drawn_parts_are_refused_under_another_name(tmp_path):
    name, config = KINDS["FourierFT"]
    posterior(name, adapted(name, config, "mood")).save_pretrained(tmp_path)
    model = adapted(name, config, "default")
    for layer in model.modules():
        if hasattr(layer, "indices"):
            layer.indices["default"] = layer.indices["default"].flip(0)
    with pytest.raises(ValueError, match="drawn or computed anew"):
        DiagLoraLaplace.from_pretrained(model, tmp_path)
    model = adapted(name, config, "default")
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    with pytest.raises(ValueError, match="the weights are not those"):
        DiagLoraLaplace.from_pretrained(model, tmp_path)


def test_what_was_frozen_at_the_fit_is_left_out_under_another_name(tmp_path):
    config = KINDS["LoRA and a head"][1]
    model = adapted("bert", config, "mood")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    la = posterior("bert", model)
    la.save_pretrained(tmp_path, precision="exact")
    again = DiagLoraLaplace.from_pretrained(adapted("bert", config, "default"), tmp_path)
    assert again.parts.engine.sizes == la.parts.engine.sizes
    assert torch.equal(again(BATCH), la(BATCH))


def test_the_lines_in_the_card_find_the_folder_that_peft_makes(tmp_path):
    model = adapted("bert", LoraConfig("SEQ_CLS", r=2, target_modules=["query"]), "mood")
    la = posterior("bert", model, kind=KronLoraLaplace)
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")
    code = loading_code(la.fitted, str(tmp_path))
    names = {"base_model": base_model("bert"), "tokenizer": None}
    exec(code.rpartition("\n")[0], names)
    assert isinstance(names["model"], PeftModel)
    assert torch.equal(names["la"].mean, la.mean)
