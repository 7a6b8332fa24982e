"""Merged, disabled and several active adapters are refused."""

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import ArrowConfig, create_arrow_model

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace
from support.batches import loader, token_batch
from support.models import TARGETS, adapter_config, base_model, peft_model

BATCH = token_batch((4, 2), seed=9)


def test_adapters_that_do_not_run_are_refused():
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged into"):
        la.fit(loader())
    with pytest.raises(RuntimeError, match="unmerge_adapter"):
        la(BATCH)
    with pytest.raises(RuntimeError, match="merged into"):
        KronLoraLaplace(model, "classification")
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(RuntimeError, match="are disabled"):
        la(BATCH)
    assert la(BATCH).isfinite().all()


@pytest.mark.parametrize("unload", ["unload", "merge_and_unload"])
def test_a_model_whose_adapter_is_gone(unload):
    model = peft_model("bert")  # with a head of its own
    base = getattr(model, unload)()
    with pytest.raises(RuntimeError, match="no layers of its adapter any more: was it merged"):
        KronLoraLaplace(model, "classification")
    with pytest.warns(UserWarning, match=r"has no adapter, .* \['classifier.weight', 'class"):
        KronLoraLaplace(base, "classification")
    KronLoraLLLaplace(base, "classification")  # a head is all that it covers


def test_two_active_adapters_are_refused():
    model = peft_model("llama-lm")
    model.add_adapter("second", adapter_config("llama-lm"))
    KronLoraLaplace(model, "classification", target_ids=TARGETS)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match="active together"):
        KronLoraLaplace(model, "classification", target_ids=TARGETS)


def test_adapters_that_arrow_mixes_are_refused(tmp_path):
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(base_model("llama-lm"), config).save_pretrained(tmp_path / name)
    places = [str(tmp_path / name) for name in ("one", "two")]
    mixed = create_arrow_model(base_model("llama-lm"), places, ArrowConfig(top_k=2))
    for uncovered in ("error", "diag"):
        with pytest.raises((RuntimeError, ValueError), match="Arrow mixes several adapters"):
            la = KronLoraLaplace(mixed, "classification", target_ids=TARGETS, uncovered=uncovered)
            la.fit(loader())
