"""Settings of an adapter that no pass in evaluation mode reads may change after a fit."""

import pytest
import torch
from peft import AdamssConfig, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig, VeloraConfig

from laplace_lora import DiagLoraLaplace
from support.batches import loader, token_batch
from support.models import base_model, excite

BATCH = token_batch((4, 2, 5), seed=3)


def model_of(kind, settings):
    config = kind(target_modules=["query", "value"], **settings)
    return excite(get_peft_model(base_model("bert"), config)).float().eval()


# What only training reads: KaSA's and VeLoRA's losses and gradients, AdaMSS's schedule; and OFT's
# radius and terms where it has neither
@pytest.mark.parametrize(
    "kind, config, changed",
    [
        (LoraConfig, {"kasa_config": KasaConfig()}, {"kasa_config": KasaConfig(beta=0.1)}),
        (LoraConfig, {"velora_config": VeloraConfig()}, {"velora_config": None}),
        (
            AdamssConfig,
            {},
            {"mask_interval": 50, "final_warmup": 7, "use_asa": True, "asa_target_subspaces": 3}
            | {"svd_threshold": 0.5, "use_dynamic_rank": True},
        ),
        (
            OFTConfig,
            {"oft_block_size": 4, "r": 0, "use_cayley_neumann": False},
            {"eps": 0.5, "num_cayley_neumann_terms": 2},
        ),
    ],
)
def test_settings_that_only_training_reads_may_change(kind, config, changed):
    model = model_of(kind, config)
    la = DiagLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    expected = la(BATCH)
    for name, value in changed.items():
        assert getattr(model.peft_config["default"], name) != value
        setattr(model.peft_config["default"], name, value)
    assert torch.equal(la(BATCH), expected)


def test_the_radius_of_constrained_oft_counts():
    model = model_of(OFTConfig, {"oft_block_size": 4, "r": 0, "coft": True})
    la = DiagLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    model.peft_config["default"].eps = 0.5
    with pytest.raises(RuntimeError, match=r"settings 'peft_config\.eps' have changed"):
        la(BATCH)
