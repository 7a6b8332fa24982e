"""Files are refused around an adapter that computes something else with the same weights."""

import dataclasses
import hashlib
import json

import pytest
import torch
from peft import (
    FourierFTConfig,
    FrodConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    ShiraConfig,
    VeraConfig,
)
from peft import get_peft_model as adapted
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.adapters.layer_settings import adapter_settings
from laplace_lora.posteriors.saved import ADAPTER
from laplace_lora.storage.files import CONFIG
from laplace_lora.storage.identity import identity
from support.batches import loader, token_batch
from support.forgery import forge
from support.models import TARGETS, base_model, excite

pytestmark = [
    pytest.mark.filterwarnings("ignore:Specified to not:UserWarning"),
    pytest.mark.filterwarnings("ignore:One of the base layers adapted with ShiRA:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]
BATCH = token_batch((4, 2, 5), seed=3)
VALUES = {"target_modules": ["query", "value"]}
NEW = (
    *("adapter_layers", "adapter_kinds", "adapter_configuration", "adapter_drawn"),
    "adapter_base_dtypes",
)
# A tuner's configuration, the setting that another value has, and both values
OTHERS = {
    "FourierFT's scaling": (FourierFTConfig, {"n_frequency": 20}, "scaling", 50.0, 300.0),
    "FourierFT's seed": (FourierFTConfig, {"n_frequency": 20}, "random_loc_seed", 777, 778),
    "SHiRA's seed": (ShiraConfig, {"r": 2}, "random_seed", 1, 2),
    "VeRA's seed": (VeraConfig, {"r": 2, "save_projection": False}, "projection_prng_key", 1, 2),
    "FRoD's seed, in files": (
        *(FrodConfig, {"sparse_rate": 0.3, "progressbar": False}, "projection_prng_key", 0, 1),
    ),
    "FRoD's seed": (
        *(FrodConfig, {"save_projection": False, "sparse_rate": 0.3, "progressbar": False}),
        *("projection_prng_key", 0, 1),
    ),
    "OFT's series": (
        *(OFTConfig, {"oft_block_size": 4, "r": 0}),
        *("use_cayley_neumann", True, False),
    ),
}


def model_of(kind, settings):
    return excite(adapted(base_model("bert"), kind(**VALUES, **settings))).double().eval()


def lora(alpha=8, prepared=False):
    config = LoraConfig(r=3, lora_alpha=alpha, **VALUES)
    model = excite(adapted(base_model("bert"), config)).double().eval()
    if prepared:  # then PEFT keeps the factors 8 / 3 as tensors, in single precision
        prepare_model_for_compiled_hotswap(model, target_rank=3, config=model.peft_config)
    return model


def saved(model, folder, kind=KronLoraLaplace, **options):
    la = kind(model, "classification", **options)
    la.fit(loader())
    la.save_pretrained(folder, precision="exact")
    return la


@pytest.mark.parametrize("case", OTHERS)
def test_another_function_of_the_same_weights_is_refused_by_the_name_of_the_setting(case, tmp_path):
    kind, config, name, then, now = OTHERS[case]
    la = saved(model_of(kind, {**config, name: then}), tmp_path, DiagLoraLaplace, uncovered="diag")
    other = model_of(kind, {**config, name: now})
    assert (other(**BATCH).logits - la.logits_model(BATCH)).abs().max() > 1e-5
    with pytest.raises(ValueError, match=f"differs from .*{name} is {now} and was {then}"):
        DiagLoraLaplace.from_pretrained(other, tmp_path)
    la.logits_model.model.save_pretrained(tmp_path)
    same = PeftModel.from_pretrained(base_model("bert"), tmp_path).double().eval()
    again = DiagLoraLaplace.from_pretrained(same, tmp_path)
    torch.testing.assert_close(again(BATCH), la(BATCH))


def test_a_seed_does_not_matter_where_the_same_was_drawn(tmp_path):
    model = model_of(FourierFTConfig, {"n_frequency": 20})
    la = saved(model, tmp_path, DiagLoraLaplace, uncovered="diag")
    model.peft_config["default"].random_loc_seed += 1
    again = DiagLoraLaplace.from_pretrained(model, tmp_path)
    model.peft_config["default"].random_loc_seed -= 1
    expected = la(BATCH)
    assert torch.equal(DiagLoraLaplace.from_pretrained(model, tmp_path)(BATCH), expected)
    assert again.n_data == la.n_data


def test_indices_that_were_drawn_without_a_seed_are_recognised(tmp_path):
    model = model_of(ShiraConfig, {"r": 2})
    saved(model, tmp_path, DiagLoraLaplace, uncovered="diag")
    DiagLoraLaplace.from_pretrained(model, tmp_path)
    layer = next(m for m in model.modules() if hasattr(m, "shira_indices"))
    layer.shira_indices["default"] = layer.shira_indices["default"].flip(0)
    with pytest.raises(ValueError, match=r"parts of the adapter that are no .* computed anew"):
        DiagLoraLaplace.from_pretrained(model, tmp_path)


def test_projections_are_recognised_in_another_dtype(tmp_path):
    model = model_of(VeraConfig, {"r": 2, "save_projection": False})
    saved(model.float(), tmp_path, DiagLoraLaplace, uncovered="diag")
    with pytest.warns(UserWarning, match="rounded to a coarser dtype"):
        DiagLoraLaplace.from_pretrained(model.bfloat16(), tmp_path)


def test_activated_lora_with_other_tokens_is_another_function(tmp_path):
    def started(token):
        config = LoraConfig(
            r=2,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
            alora_invocation_tokens=[token],
        )
        return excite(adapted(base_model("llama-lm"), config)).double().eval()

    options = {"target_ids": TARGETS, "uncovered": "diag"}
    batch = {**BATCH, "input_ids": BATCH["input_ids"].clone()}
    batch["input_ids"][:, 1] = 7
    model = started(7)
    la = saved(model, tmp_path, DiagLoraLaplace, **options)
    expected = la(batch)
    with pytest.raises(ValueError, match=r"alora_invocation_tokens is \[9\] and was \[7\]"):
        DiagLoraLaplace.from_pretrained(started(9), tmp_path)
    model.peft_config["default"].alora_invocation_tokens = [9]
    with pytest.raises(RuntimeError, match=r"settings '.*alora_invocation_tokens' have changed"):
        la(batch)
    model.peft_config["default"].alora_invocation_tokens = [7]
    assert torch.equal(la(batch), expected)
    config = model.peft_config["default"]
    other = dataclasses.replace(config, alora_invocation_tokens=[9])
    model.peft_config["default"] = other
    with pytest.raises(RuntimeError, match=r"settings '.*alora_invocation_tokens' have changed"):
        la(batch)
    model.peft_config["default"] = config
    assert torch.equal(la(batch), expected)


@pytest.mark.parametrize("prepared", [False, True])
def test_a_model_prepared_for_swapping_adapters_is_the_same(prepared, tmp_path):
    la = saved(lora(prepared=prepared), tmp_path)
    other = lora(prepared=not prepared)
    torch.testing.assert_close(KronLoraLaplace.from_pretrained(other, tmp_path)(BATCH), la(BATCH))
    with pytest.raises(ValueError, match="configuration differs"):
        KronLoraLaplace.from_pretrained(lora(20, prepared=True), tmp_path)


def test_files_of_earlier_versions_load_and_refuse_another_alpha(tmp_path):
    la = saved(lora(), tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text())
    earlier = {name: value for name, value in content.items() if name not in NEW}
    (tmp_path / CONFIG).write_text(json.dumps(earlier))
    forge(tmp_path)
    assert torch.equal(KronLoraLaplace.from_pretrained(lora(), tmp_path)(BATCH), la(BATCH))
    with pytest.raises(ValueError, match="configuration differs"):
        KronLoraLaplace.from_pretrained(lora(20), tmp_path)


def test_earlier_versions_kept_no_factor_of_a_model_prepared_for_swapping_adapters(tmp_path):
    la = saved(lora(prepared=True), tmp_path)
    expected = la(BATCH)
    settings = adapter_settings(la.logits_model)
    without = {n: [kind, variant, None, fan] for n, (kind, variant, _, fan) in settings.items()}
    digest = hashlib.sha256(json.dumps(without, sort_keys=True).encode()).hexdigest()
    content = json.loads((tmp_path / CONFIG).read_text())
    earlier = {name: value for name, value in content.items() if name not in NEW}
    (tmp_path / CONFIG).write_text(json.dumps(earlier))
    forge(tmp_path, adapter_settings=digest)
    for prepared in (False, True):
        again = KronLoraLaplace.from_pretrained(lora(prepared=prepared), tmp_path)
        torch.testing.assert_close(again(BATCH), expected)
    state = la.state_dict()
    la.load_state_dict({**state, ADAPTER: {**state[ADAPTER], **without}})
    assert torch.equal(la(BATCH), expected)
    forge(tmp_path, adapter_settings=digest[::-1])
    with pytest.raises(ValueError, match="configuration differs"):
        KronLoraLaplace.from_pretrained(lora(), tmp_path)


def test_settings_that_later_versions_of_peft_add_are_no_difference(tmp_path):
    la = saved(lora(), tmp_path)
    known = identity(la.parts)["adapter_configuration"]
    assert "alora_invocation_tokens" in known and not {"lora_alpha", "lora_dropout"} & set(known)
    forge(tmp_path, adapter_configuration={"a_new_one": 3, "peft_type": "LORA"})
    KronLoraLaplace.from_pretrained(lora(), tmp_path)


def test_training_and_bookkeeping_are_no_settings_of_the_function(tmp_path):
    la = saved(lora(), tmp_path)
    config = la.logits_model.model.peft_config["default"]
    config.init_lora_weights, config.lora_dropout, config.inference_mode = "gaussian", 0.3, True
    config.base_model_name_or_path, config.lora_alpha = "elsewhere", 5
    expected = la(BATCH)
    again = KronLoraLaplace.from_pretrained(la.logits_model.model, tmp_path)
    assert torch.equal(again(BATCH), expected)


def test_factors_that_are_tensors_are_read():
    found, expected = adapter_settings(lora(prepared=True)), adapter_settings(lora())
    assert found.keys() == expected.keys() and len(found) == 4
    for name, setting in found.items():
        assert setting[2] == pytest.approx(expected[name][2], rel=1e-7)
        assert setting[:2] + setting[3:] == expected[name][:2] + expected[name][3:]
