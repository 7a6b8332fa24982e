"""Merged, disabled and several active adapters are refused."""

import pytest

from laplace_lora import KronLoraLaplace
from support.batches import loader, token_batch
from support.models import TARGETS, adapter_config, peft_model

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


def test_two_active_adapters_are_refused():
    model = peft_model("llama-lm")
    model.add_adapter("second", adapter_config("llama-lm"))
    KronLoraLaplace(model, "classification", target_ids=TARGETS)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(RuntimeError, match="active together"):
        KronLoraLaplace(model, "classification", target_ids=TARGETS)
