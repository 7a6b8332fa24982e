"""The model before training, whose features have seen no label."""

import pytest
import torch

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.models.start import before_adapter
from support.batches import loader, token_batch
from support.models import base_model, peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
WHOLE = ["classifier", "layer.0.intermediate.dense"]


def trained(**kwargs):
    """A tiny BERT of which everything that trains has moved."""
    model = peft_model("bert", **kwargs)
    with torch.no_grad():
        for n, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)).to(p))
    return model.eval()


@pytest.mark.parametrize("twin", [True, False])
def test_whole_modules_are_those_that_they_replaced(twin, monkeypatch):
    if not twin:
        monkeypatch.setattr("laplace_lora.models.start.twin_of", lambda model, own: (None, []))
    model = trained(modules_to_save=WHOLE)
    before = {name: p.clone() for name, p in model.named_parameters()}
    expected = base_model("bert").double().eval()
    head = model.base_model.model.classifier.modules_to_save["default"]
    expected.classifier.load_state_dict(head.state_dict())
    with before_adapter(LogitsModel(model)) as (start, at_start), at_start():
        assert_near(start(BATCH), expected(**BATCH).logits)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_reports_say_that_biases_know_the_labels(bias):
    la = KronLoraLaplace(trained(bias=bias), "classification", uncovered="diag")
    la.fit(loader())
    la.optimize_prior_precision(method="loo")
    assert la.tuning.leave_one_out.knows_labels == (bias != "none")
    assert ("know the labels" in str(la.tuning)) == (bias != "none")


def test_what_is_offloaded_is_asked_for():
    model = trained(modules_to_save=WHOLE)
    wrapper = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    wrapper.original_module.to("meta")
    message = r"intermediate\.dense\.weight' was before training"
    with pytest.raises(ValueError, match=message), before_adapter(LogitsModel(model)):
        pass
