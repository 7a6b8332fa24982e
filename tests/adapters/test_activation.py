"""Adapters that were loaded for inference are made trainable."""

import pytest
import torch
from peft import (
    AdaLoraConfig,
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from support.batches import loader, token_batch
from support.models import TARGETS, base_model, excite

BATCH = token_batch((4, 2), seed=9)
SLOW = pytest.mark.slow


@pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")  # PEFT's own way
def test_a_cartridge_that_was_loaded_is_covered(tmp_path):
    """PEFT freezes it, and refuses to load it as trainable."""
    config = CartridgeConfig(num_virtual_tokens=4, num_frozen_tokens=1, task_type="CAUSAL_LM")
    model = excite(get_peft_model(base_model("llama-lm").double(), config))
    model.save_pretrained(tmp_path)
    la = DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    loaded = PeftModel.from_pretrained(base_model("llama-lm").double(), tmp_path)
    again = DiagLoraLaplace.from_pretrained(loaded, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert not loaded.prompt_encoder["default"].frozen_embedding.requires_grad


def test_the_head_beside_prompts_that_were_loaded_is_covered(tmp_path):
    """PEFT freezes it, though not the prompts, and refuses to load these as trainable."""
    config = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    model = excite(get_peft_model(base_model("bert").double(), config))
    model.save_pretrained(tmp_path)
    la = DiagLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    loaded = PeftModel.from_pretrained(base_model("bert").double(), tmp_path)
    again = DiagLoraLaplace.from_pretrained(loaded, tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))
    assert any("classifier" in name for name in again.fitted.names)


def test_a_posterior_over_the_network_behind_prompts_says_that_peft_does_not_save_it(tmp_path):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, encoder_hidden_size=8)
    model = excite(get_peft_model(base_model("llama-lm").double(), config))
    model.save_pretrained(tmp_path)
    la = DiagLoraLaplace(model, "classification", target_ids=TARGETS, uncovered="diag")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model("llama-lm").double(), tmp_path)
    with pytest.raises(ValueError, match="PEFT saves prompts without the network"):
        DiagLoraLaplace.from_pretrained(loaded, tmp_path)


def with_biases(bias, kind=LoraConfig, **kwargs):
    config = kind(
        target_modules=["query", "value"], modules_to_save=["classifier"], bias=bias, **kwargs
    )
    return excite(get_peft_model(base_model("bert").double(), config)).double()


@pytest.mark.parametrize(
    ("bias", "arguments"),
    [
        ("all", {"r": 2}),
        ("all", {"r": 2, "lora_bias": True}),  # which stays trainable as well
        ("lora_only", {"r": 2}),
        pytest.param("oft_only", {"kind": OFTConfig, "oft_block_size": 4, "r": 0}, marks=SLOW),
    ],
)
def test_an_adapter_that_was_loaded_with_biases_is_covered(tmp_path, bias, arguments):
    """PEFT freezes the adapter, though not the biases of the base model."""
    model = with_biases(bias, **arguments)
    la = KronLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    model.save_pretrained(tmp_path)
    la.save_pretrained(tmp_path, precision="exact")

    def loaded():
        return PeftModel.from_pretrained(base_model("bert").double(), tmp_path)

    assert any(p.requires_grad for p in loaded().parameters())
    fresh = KronLoraLaplace(loaded(), "classification", uncovered="diag")
    assert fresh.block_names == la.block_names
    fresh.fit(loader())
    assert torch.equal(fresh(BATCH), la(BATCH))
    assert torch.equal(KronLoraLaplace.from_pretrained(loaded(), tmp_path)(BATCH), la(BATCH))


def test_biases_alone_are_covered_where_the_adapter_was_frozen_on_purpose():
    model = with_biases("all", r=2)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" not in name and p.requires_grad)
    trained = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="the adapter is frozen"):
        la = KronLoraLaplace(model, "classification", uncovered="diag")
    assert la.block_names == trained


def test_biases_that_were_frozen_after_loading_stay_so(tmp_path):
    with_biases("all", r=2).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model("bert").double(), tmp_path)
    for name, p in model.named_parameters():
        if "LayerNorm" in name:
            p.requires_grad_(False)
    la = KronLoraLaplace(model, "classification")
    assert any("lora_A" in name for name in la.block_names)
    assert any(name.endswith("key.bias") for name in la.block_names)
    assert not any("LayerNorm" in name for name in la.block_names)


QUERIES = {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
CAST = {
    "adalora": lambda: AdaLoraConfig(init_r=4, target_r=2, total_step=20, **QUERIES),
    "ia3": lambda: IA3Config(feedforward_modules=[], **QUERIES),
    "embedding": lambda: LoraConfig(
        r=2, target_modules=["word_embeddings", "query"], task_type="SEQ_CLS"
    ),
}


@pytest.mark.filterwarnings("ignore:the adapter's weights are those")  # the head is in half
@pytest.mark.parametrize("config", CAST.values(), ids=CAST)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_adapter_that_was_cast_in_loading_is_covered_with_its_head(tmp_path, config, dtype):
    """PEFT's casts are trainable in a model that it loads for inference, and the rest is not."""
    model = excite(get_peft_model(base_model("bert"), config()))
    la = DiagLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    model.save_pretrained(tmp_path)

    def loaded():
        return PeftModel.from_pretrained(base_model("bert").to(dtype), tmp_path)

    assert any(p.requires_grad for p in loaded().parameters())
    fresh = DiagLoraLaplace(loaded(), "classification", uncovered="diag")
    assert fresh.block_names == la.block_names
    assert any("classifier" in name for name in fresh.block_names)
    again = DiagLoraLaplace.from_pretrained(loaded(), tmp_path)
    assert again.block_names == la.block_names


def test_a_cast_adapter_of_which_part_was_frozen_stays_so(tmp_path):
    get_peft_model(base_model("bert"), CAST["ia3"]()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model("bert").bfloat16(), tmp_path)
    for name, p in model.named_parameters():
        if "value" in name:
            p.requires_grad_(False)
    trained = [f"model.{name}" for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    la = DiagLoraLaplace(model, "classification", uncovered="diag")
    assert la.block_names == trained
