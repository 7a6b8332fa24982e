"""Samples of weights that do not run would change nothing: such states are refused by name."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    FunctionalLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
)
from laplace_lora.generation import generate, score
from support.batches import loader, token_batch
from support.generation import K, seeded
from support.language import language_posterior, text_batch, text_loader
from support.models import peft_model
from support.posteriors import LOW
from support.references import assert_near
from support.spans import question_batch, question_loader, span_posterior
from support.tokens import tagged_batch, tagged_loader, tagged_posterior

WEIGHTS = {"pred_type": "nn", "link_approx": "mc", "n_samples": 4}


def classified():
    la = KronLoraLaplace(peft_model("bert"), "classification", **LOW)
    la.fit(loader())
    return la


def head_only(cls, **kwargs):
    la = cls(peft_model("bert"), "classification", **kwargs)
    la.fit(loader())
    return la


def process():
    model = peft_model("bert", dtype=torch.float32)
    la = FunctionalLoraLLLaplace(model, "classification", 5)
    la.fit(loader())
    la.logits_model = la.features.source
    return la


def cases():
    classes, tags, texts, spans = token_batch(), tagged_batch(), text_batch(), question_batch()
    yield "classes", classified, lambda la: la(classes, method="sampled")
    yield "weights", classified, lambda la: la(classes, **WEIGHTS, generator=seeded())
    for cls in (KronLoraLLLaplace, DiagLoraLLLaplace, FullLoraLLLaplace):
        yield cls.__name__, partial(head_only, cls), lambda la: la(classes)
    one = partial(head_only, KronLoraLLLaplace)
    yield "head weights", one, lambda la: la(classes, **WEIGHTS, generator=seeded())
    yield "head predict", one, lambda la: la.predict(classes).probs
    yield "process", process, lambda la: la(classes)
    yield "tags", tagged_posterior, lambda la: la(tags)
    yield "tag weights", tagged_posterior, lambda la: la(tags, **WEIGHTS, generator=seeded())
    yield "spans", span_posterior, lambda la: la.predict(spans).prob
    yield "score", language_posterior, lambda la: score(la, texts, K, generator=seeded()).log_prob
    prompts = texts["input_ids"][:1, :3]
    yield (
        "text",
        language_posterior,
        lambda la: generate(la, prompts, 2, K, generator=seeded()).mean,
    )


CASES = [pytest.param(make, call, id=name) for name, make, call in cases()]
TUNED = {
    "tags": (tagged_posterior, lambda la: la.calibrate(tagged_loader())),
    "spans": (span_posterior, lambda la: la.calibrate(question_loader())),
    "width": (language_posterior, lambda la: la.optimize_prior_precision(method="widest")),
}


@pytest.mark.parametrize("make,call", CASES)
def test_predictions_need_the_posteriors_adapter(make, call):
    la = make()
    model = la.logits_model.model
    expected = call(la)
    with model.disable_adapter(), pytest.raises(RuntimeError, match="disabled; leave"):
        call(la)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"merged into.*unmerge_adapter"):
        call(la)
    model.unmerge_adapter()
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(targets)))
    assert_near(call(la), expected, 1e-5)
    model.set_adapter("other")
    with pytest.raises(RuntimeError, match=r"lora_A.*belong to an adapter that is not active"):
        call(la)
    model.set_adapter("default")
    assert_near(call(la), expected, 1e-5)


@pytest.mark.parametrize("name", ["attention", "query", "lora_A", "weight"])
def test_an_adapter_called_as_a_module_is_another_one(name, tmp_path):
    """The answer was the MAP of that adapter, without a word."""
    la = classified()
    model = la.logits_model.model
    expected = la(token_batch())
    model.add_adapter(name, LoraConfig(r=2, target_modules=["query", "value"]))
    model.set_adapter(name)
    calls = (
        lambda: la(token_batch()),
        lambda: la.predict(token_batch()),
        lambda: la.save_pretrained(tmp_path),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"lora_A.*belong to an adapter that is not active"):
            call()
    model.set_adapter("default")
    assert_near(la(token_batch()), expected, 1e-5)


NAMES = [["other"] * 3, ["default", "other", "__base__"], ["default"] * 3]


def asking():
    """What reads batches, with one that it takes."""
    batch = token_batch()
    tags, spans, texts = tagged_batch(), question_batch(), text_batch()
    head = partial(head_only, KronLoraLLLaplace)
    yield "exact", classified, lambda la, n: la({**batch, **n}, method="exact")
    yield "sampled", classified, lambda la, n: la({**batch, **n}, method="sampled")
    yield "weights", classified, lambda la, n: la({**batch, **n}, **WEIGHTS)
    yield "predict", classified, lambda la, n: la.predict({**batch, **n})
    yield "head", head, lambda la, n: la({**batch, **n})
    yield "fit", classified, lambda la, n: la.fit(DataLoader([{**batch, **n}], batch_size=None))
    yield "tags", tagged_posterior, lambda la, n: la({**tags, **n})
    yield "spans", span_posterior, lambda la, n: la.predict({**spans, **n})
    yield "score", language_posterior, lambda la, n: score(la, {**texts, **n}, K)
    yield "token", language_posterior, lambda la, n: score(la, {**texts, **n}, K, method="exact")
    yield "text", language_posterior, lambda la, n: generate(la, {**texts, **n}, 2, K)


@pytest.mark.parametrize("make,call", [pytest.param(m, c, id=name) for name, m, c in asking()])
def test_rows_are_of_the_posteriors_adapter(make, call):
    """Those of another one had its answer, and no variance."""
    la = make()
    model = la.logits_model.model
    targets = model.peft_config["default"].target_modules
    model.add_adapter("other", LoraConfig(r=2, target_modules=list(targets)))
    for names in NAMES:
        with pytest.raises(ValueError, match=r"'adapter_names' asks for .*and a posterior is of"):
            call(la, {"adapter_names": names})
    call(la, {"adapter_names": None})


def test_so_are_rows_one_by_one():
    la = classified()
    rows = [{**row, "adapter_names": "other"} for row in loader().dataset]
    with pytest.raises(ValueError, match=r"'adapter_names' asks for the adapters \['other'\]"):
        la.predict(rows)


@pytest.mark.parametrize("name", TUNED)
def test_so_do_widths(name):
    make, call = TUNED[name]
    la = make()
    idle = la.logits_model.model.disable_adapter()
    with idle, pytest.raises(RuntimeError, match="disabled; leave"):
        call(la)
    assert float(la.covariance_scale) == 1


def test_so_do_adapters_for_a_server(tmp_path):
    la = language_posterior()
    idle = la.logits_model.model.disable_adapter()
    with idle, pytest.raises(RuntimeError, match="disabled; leave"):
        la.export_adapters(tmp_path / "served", 2, loader=text_loader())
    assert len(la.export_adapters(tmp_path / "served", 2, width=0.01).adapters) == 2


def test_last_layers_are_not_fitted_on_other_features():
    la = KronLoraLLLaplace(peft_model("bert"), "classification")
    with la.logits_model.model.disable_adapter(), pytest.raises(RuntimeError, match="disabled"):
        la.fit(loader())
    assert not la.state.is_fitted


def test_copies_of_last_layer_posteriors_watch_their_own_adapter():
    la = head_only(KronLoraLLLaplace)
    twin = copy.deepcopy(la)
    twin.logits_model.model.merge_adapter()
    with pytest.raises(RuntimeError, match="merged into"):
        twin(token_batch())
    la(token_batch())
    twin.logits_model.model.unmerge_adapter()
    assert_near(twin(token_batch()), la(token_batch()), 1e-5)


def test_an_adapter_that_is_gone_is_named():
    la = language_posterior()
    model = la.logits_model.model
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    model.delete_adapter("default")
    with pytest.raises(RuntimeError, match="no longer part of the model"):
        score(la, text_batch(), K)


def test_frozen_weights_are_sampled_all_the_same():
    la = language_posterior()
    expected = score(la, text_batch(), K, generator=seeded())
    la.logits_model.requires_grad_(False)
    found = score(la, text_batch(), K, generator=seeded())
    assert_near(found.log_prob, expected.log_prob, 0)
