"""Adapters of which PEFT computes parts from the base model, around one in another dtype."""

import pytest
import torch
from peft import AdamssConfig, LoraConfig, OSFConfig, PeftModel, PsoftConfig
from peft import get_peft_model as adapted

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from support.batches import loader, token_batch
from support.models import base_model, excite

BATCH = token_batch((4, 2, 5), seed=3)
VALUES = {"target_modules": ["query", "value"]}


def model_of(kind, settings):
    return excite(adapted(base_model("bert"), kind(**VALUES, **settings))).float().eval()


def saved(model, folder, kind=KronLoraLaplace, **options):
    la = kind(model, "classification", **options)
    la.fit(loader())
    la.save_pretrained(folder, precision="exact")
    return la


@pytest.mark.parametrize(
    "kind, settings", [(OSFConfig, {"effective_rank": 8}), (PsoftConfig, {"r": 8})]
)
def test_parts_computed_from_a_base_model_in_another_dtype_are_recognised(kind, settings, tmp_path):
    la = saved(model_of(kind, settings), tmp_path, DiagLoraLaplace, uncovered="diag")
    la.logits_model.model.save_pretrained(tmp_path)
    same = PeftModel.from_pretrained(base_model("bert").bfloat16(), tmp_path).eval()
    again = DiagLoraLaplace.from_pretrained(same, tmp_path)
    torch.testing.assert_close(again(BATCH).float(), la(BATCH), atol=2e-3, rtol=0)


def test_other_parts_computed_from_a_base_model_ask_for_its_dtype(tmp_path):
    la = saved(model_of(AdamssConfig, {"r": 8}), tmp_path, DiagLoraLaplace, uncovered="diag")
    la.logits_model.model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(base_model("bert").bfloat16(), tmp_path).eval()
    reason = r"no weights .* in torch.float32 and is in torch.bfloat16: load the base model in"
    for layer in other.modules():
        if hasattr(layer, "scatter_index"):
            layer.scatter_index["default"] = layer.scatter_index["default"].flip(0)
    with pytest.raises(ValueError, match=reason):
        DiagLoraLaplace.from_pretrained(other, tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_a_start_computed_from_the_base_model_asks_for_its_dtype(start, tmp_path):
    model = adapted(base_model("bert"), LoraConfig(r=2, init_lora_weights=start, **VALUES)).eval()
    saved(model, tmp_path)
    model.save_pretrained(tmp_path)
    rounded = PeftModel.from_pretrained(base_model("bert").bfloat16(), tmp_path).eval()
    with pytest.raises(ValueError, match=f"'{start}' changes .*same base model in the dtype") as e:
        KronLoraLaplace.from_pretrained(rounded, tmp_path)
    assert "random" not in str(e.value)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights:UserWarning")
def test_a_base_model_that_loading_changes_at_random_can_be_saved(tmp_path):
    def loaded(base, folder):
        return PeftModel.from_pretrained(base, folder).eval()

    config = LoraConfig(r=2, init_lora_weights="pissa_niter_2", **VALUES)
    model = adapted(base_model("bert"), config).eval()
    la = saved(model, tmp_path)
    expected = la(BATCH)
    model.save_pretrained(tmp_path / "again")
    torch.manual_seed(5)
    base = base_model("bert")
    torch.manual_seed(6)
    with pytest.raises(ValueError, match=r"'pissa_niter_2' changes .*init_lora_weights = True"):
        KronLoraLaplace.from_pretrained(loaded(base, tmp_path / "again"), tmp_path)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    again = KronLoraLaplace.from_pretrained(loaded(base, tmp_path / "adapter"), tmp_path)
    torch.testing.assert_close(again(BATCH), expected)
