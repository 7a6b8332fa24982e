"""Adapters that are loaded beside the active one change neither the function nor its files."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from laplace_lora import KronLoraLaplace, KronLoraLLLaplace
from laplace_lora.adapters.layer_settings import adapter_settings
from laplace_lora.adapters.plain_names import plain_names
from laplace_lora.storage.identity import identity
from support.batches import loader, token_batch
from support.forgery import forge
from support.interruptions import Interrupted, Interruption
from support.models import TARGETS, base_model, excite

BATCH = token_batch((4, 2, 5), seed=3)
QUERIES = {"llama-lm": ["q_proj", "v_proj"], "bert": ["query"]}
IDLE = {
    "other layers": ("llama-lm", {"target_modules": ["k_proj", "o_proj"]}),
    "some of its layers": ("llama-lm", {"target_modules": ["q_proj", "down_proj"]}),
    "a head": ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    "a layer in a head": ("bert", {"target_modules": ["classifier", "pooler.dense"]}),
    "tokens": ("llama-lm", {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}),
}
CASES = [pytest.param(*case, id=name) for name, case in IDLE.items()]


def alone(name):
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=QUERIES[name])
    return excite(get_peft_model(base_model(name), lora)).double().eval()


def beside(model, settings):
    model.add_adapter("idle", LoraConfig(r=2, **settings))
    model.set_adapter("default")
    return model.double().eval()


def posterior(name, model, fit=True):
    ids = TARGETS if name.endswith("-lm") else None
    la = KronLoraLaplace(model, "classification", target_ids=ids)
    if fit:
        la.fit(loader())
    return la


@pytest.mark.parametrize("name,settings", CASES)
def test_a_file_loads_without_the_idle_adapter_of_the_fit(name, settings, tmp_path):
    model = beside(alone(name), settings)
    la = posterior(name, model)
    la.save_pretrained(tmp_path, precision="exact")
    again = KronLoraLaplace.from_pretrained(alone(name), tmp_path)
    assert torch.equal(again(BATCH), la(BATCH))


@pytest.mark.parametrize("name,settings", CASES)
def test_a_file_loads_beside_an_idle_adapter_that_the_fit_did_not_know(name, settings, tmp_path):
    model = alone(name)
    la = posterior(name, model)
    expected = la(BATCH)
    la.save_pretrained(tmp_path, precision="exact")
    beside(model, settings)
    assert torch.equal(KronLoraLaplace.from_pretrained(model, tmp_path)(BATCH), expected)
    assert torch.equal(la(BATCH), expected)
    la.fit(loader(), override=False)
    la.save_pretrained(tmp_path, precision="exact")
    KronLoraLaplace.from_pretrained(model, tmp_path)


@pytest.mark.parametrize("name,settings", CASES)
def test_names_and_settings_are_those_of_the_active_adapter_alone(name, settings):
    expected, model = alone(name), beside(alone(name), settings)
    assert adapter_settings(model) == adapter_settings(expected)
    plain = plain_names(model)
    found = [plain(n) for n, _ in model.named_parameters() if ".idle" not in n]
    found = [n for n in found if "trainable_tokens" not in n]
    assert found == [n for n, _ in expected.named_parameters()]
    model.set_adapter("idle")
    assert adapter_settings(model) != adapter_settings(expected)


@pytest.mark.parametrize("name,settings", CASES)
def test_a_file_of_an_earlier_version_loads_beside_the_same_idle_adapter(name, settings, tmp_path):
    """They took names as PEFT has them, and listed the layers of idle adapters."""
    model = beside(alone(name), settings)
    la = posterior(name, model)
    la.save_pretrained(tmp_path, precision="exact")
    earlier = identity(la.parts, plain=False, by_name=False)
    assert any(earlier[key] != value for key, value in identity(la.parts).items())
    forge(tmp_path, **earlier)
    assert torch.equal(KronLoraLaplace.from_pretrained(model, tmp_path)(BATCH), la(BATCH))
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layernorm" in n.lower()).mul_(1.1)
    with pytest.raises(ValueError, match="the base model differs"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_a_base_weight_under_an_idle_adapter_still_counts(tmp_path):
    model = alone("llama-lm")
    posterior("llama-lm", model).save_pretrained(tmp_path)
    beside(model, {"target_modules": ["k_proj"]})
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "k_proj.base_layer.weight" in n).mul_(1.1)
    with pytest.raises(ValueError, match="the base model differs"):
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_posteriors_merge_with_and_without_an_idle_adapter():
    one, two = (posterior("llama-lm", alone("llama-lm")) for _ in range(2))
    beside(two.logits_model.model, {"target_modules": ["k_proj"]})
    one.merge([two])
    assert one.n_data == 2 * two.n_data


@pytest.mark.parametrize("at_first", [True, False])
def test_an_interrupted_fit_goes_on_with_and_without_an_idle_adapter(at_first, tmp_path):
    models = [alone("llama-lm"), alone("llama-lm")]
    beside(models[not at_first], {"target_modules": ["k_proj"]})
    options = {"checkpoint_dir": tmp_path, "checkpoint_every": 1}
    first, second = (posterior("llama-lm", model, fit=False) for model in models)
    with pytest.raises(Interruption):
        first.fit(Interrupted(loader(2), 2), **options)
    second.fit(loader(2), **options)
    straight = posterior("llama-lm", alone("llama-lm"), fit=False)
    straight.fit(loader(2))
    assert torch.equal(second(BATCH), straight(BATCH))


@pytest.mark.parametrize("kind", [KronLoraLaplace, KronLoraLLLaplace])
def test_nothing_is_saved_while_the_adapter_does_not_run(kind, tmp_path):
    """The file would describe the adapter that runs, and load onto no model."""
    model = beside(alone("llama-lm"), {"target_modules": ["k_proj"]})
    la = kind(model, "classification", target_ids=TARGETS)
    la.fit(loader())
    model.set_adapter("idle")
    with pytest.raises(RuntimeError, match="not active"):
        la.save_pretrained(tmp_path)
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(RuntimeError, match="are disabled"):
        la.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    la.save_pretrained(tmp_path, precision="exact")
    assert torch.equal(kind.from_pretrained(model, tmp_path)(BATCH), la(BATCH))


@pytest.mark.parametrize("kind", [KronLoraLaplace, KronLoraLLLaplace])
def test_nothing_is_loaded_while_the_adapter_is_merged(kind, tmp_path):
    """A last layer's features would be refused later, and merging makes the base model another."""
    model = alone("llama-lm")
    la = kind(model, "classification", target_ids=TARGETS)
    la.fit(loader())
    la.save_pretrained(tmp_path)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"are merged into .*unmerge_adapter\(\)"):
        kind.from_pretrained(model, tmp_path)
