"""A caller's autocast reaches the model and none of the algebra; inference mode changes nothing."""

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.generation import generate, score
from support.batches import token_batch
from support.generation import FIELDS, K, seeded
from support.language import text_batch, text_loader
from support.models import peft_model
from support.references import assert_near

METHODS = pytest.mark.parametrize("method", ["sampled", "exact"])
PROMPTS = token_batch((4, 4))["input_ids"]


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def inside(model):
    """The same model, whose own forward pass is under autocast."""
    base = model.get_base_model()
    kind = type(base)
    base.__class__ = type(kind.__name__, (kind,), {"forward": autocast()(kind.forward)})
    return model


def fitted(change=lambda model: model):
    model = change(peft_model("llama-lm", dtype=torch.float32))
    la = KronLoraLaplace(model, "language_modeling", prior_precision=3.0)
    torch.manual_seed(0)
    la.fit(text_loader())
    return la


@METHODS
def test_autocast_around_the_calls_is_as_inside_the_model(method):
    la = fitted(inside)
    how = {"top_k": K, "method": method}
    expected = score(la, text_batch(), **how, generator=seeded())
    texts = generate(la, PROMPTS, 3, **how, generator=seeded())
    kind = type(la.logits_model.model.get_base_model())
    la.logits_model.model.get_base_model().__class__ = kind.__mro__[1]
    with autocast():
        found = score(la, text_batch(), **how, generator=seeded())
        written = generate(la, PROMPTS, 3, **how, generator=seeded())
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.float32
        assert_near(getattr(found, name), getattr(expected, name), 1e-5)
        assert_near(getattr(written, name), getattr(texts, name), 1e-5)
    assert torch.equal(written.tokens, texts.tokens)


def test_the_width_is_chosen_under_the_callers_autocast():
    expected = fitted(inside)
    expected.optimize_prior_precision()
    around = fitted()
    with autocast():
        torch.manual_seed(0)
        around.fit(text_loader())
        around.optimize_prior_precision()
    found, wanted = around.tuning.widest, expected.tuning.widest
    assert found.nll_map == pytest.approx(wanted.nll_map, rel=1e-5)
    assert found.nll == pytest.approx(wanted.nll, rel=1e-4)


@METHODS
def test_inference_mode_around_the_calls_changes_nothing(method):
    la, how = fitted(), {"top_k": K, "method": method}
    expected = score(la, text_batch(), **how, generator=seeded())
    texts = generate(la, PROMPTS, 3, **how, generator=seeded())
    with torch.inference_mode():
        found = score(la, text_batch(), **how, generator=seeded())
        written = generate(la, token_batch((4, 4))["input_ids"], 3, **how, generator=seeded())
    for name in FIELDS:
        assert_near(getattr(found, name), getattr(expected, name), 0)
        assert_near(getattr(written, name), getattr(texts, name), 0)
