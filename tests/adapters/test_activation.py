"""Adapters that were loaded for inference are made trainable."""

import pytest
import torch
from peft import (
    CartridgeConfig,
    PeftModel,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)

from laplace_lora import DiagLoraLaplace
from support.batches import loader, token_batch
from support.models import TARGETS, base_model, excite

BATCH = token_batch((4, 2), seed=9)


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
