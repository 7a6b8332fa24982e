"""A posterior finds its model again in float16, as it does in bfloat16, and refuses others."""

import copy
import json
import warnings

import pytest
import torch

from laplace_lora import KronLoraLaplace
from laplace_lora.storage.base_samples import BASE_SAMPLES, BaseSamples
from laplace_lora.storage.files import read_files
from laplace_lora.storage.identity import check_identity
from laplace_lora.storage.rounding import ROUNDED, identity_but_for_rounding
from support.batches import loader, token_batch
from support.models import peft_model

BFLOAT, HALF, SINGLE = torch.bfloat16, torch.float16, torch.float32
MODEL = peft_model("llama-lm", dtype=SINGLE)
BATCH = token_batch((6, 3, 5))
KINDS = [(SINGLE, SINGLE), (BFLOAT, SINGLE), (HALF, SINGLE), (BFLOAT, BFLOAT), (HALF, HALF)]


def in_dtypes(base, adapter):
    """The model with base and adapter rounded from single precision."""
    model = copy.deepcopy(MODEL)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(adapter if "lora_" in name else base)
    return model


def fitted(*kinds):
    la = KronLoraLaplace(in_dtypes(*kinds), "classification", target_ids=[7, 11, 13])
    la.fit(loader())
    return la


def scaled(model, factor, name="mlp.up_proj"):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if name in n).mul_(factor)
    return model


@pytest.mark.parametrize("before", KINDS)
def test_the_model_is_recognised_in_other_dtypes(tmp_path, before):
    la = fitted(*before)
    la.save_pretrained(tmp_path)
    saved = {n: p for n, p in la.logits_model.model.named_parameters() if "lora_" in n}
    for base, adapter in KINDS:
        model = in_dtypes(base, adapter)
        for name, parameter in model.named_parameters():
            if name in saved:
                parameter.data = saved[name].data.to(adapter)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = KronLoraLaplace.from_pretrained(model, tmp_path)
        exact = all(torch.equal(p.to(adapter).to(p), p) for p in saved.values())
        assert any("rounded to a coarser dtype" in str(w.message) for w in said) is not exact
        assert (again(BATCH) - la(BATCH)).abs().max() < 0.03


@pytest.mark.parametrize("name", ["lora_A", "mlp.up_proj", "input_layernorm"])
@pytest.mark.parametrize("kinds", [(HALF, HALF), (HALF, SINGLE)])
def test_other_weights_in_float16_are_refused(tmp_path, name, kinds):
    la = fitted(SINGLE, SINGLE)
    la.save_pretrained(tmp_path)
    model = scaled(in_dtypes(*kinds), 1.02, name)
    message = "weights are not those" if name == "lora_A" else "the base model differs"
    with pytest.raises(ValueError, match=message), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        KronLoraLaplace.from_pretrained(model, tmp_path)


def test_a_base_model_trained_a_little_further_is_refused_without_float16(tmp_path):
    fitted(SINGLE, SINGLE).save_pretrained(tmp_path / "single")
    fitted(HALF, HALF).save_pretrained(tmp_path / "half")
    for name, dtype in (("single", SINGLE), ("single", BFLOAT), ("half", HALF)):
        model = scaled(in_dtypes(dtype, HALF if dtype == HALF else SINGLE), 1.004)
        with pytest.raises(ValueError, match="the base model differs"):
            KronLoraLaplace.from_pretrained(model, tmp_path / name)


def test_files_of_earlier_versions_are_read_as_they_were(tmp_path):
    fitted(SINGLE, SINGLE).save_pretrained(tmp_path)
    _, saved = read_files(tmp_path)
    saved.pop(BASE_SAMPLES)
    for known in saved[ROUNDED].values():
        known.pop("float16")

    def check(*kinds):
        la = KronLoraLaplace(in_dtypes(*kinds), "classification", target_ids=[7, 11, 13])
        check_identity(saved, identity_but_for_rounding(la.parts, saved))

    check(SINGLE, SINGLE)
    check(BFLOAT, SINGLE)
    with pytest.warns(UserWarning, match="rounded to a coarser dtype"):
        check(BFLOAT, BFLOAT)
    with pytest.raises(ValueError, match="the base model differs"):
        check(HALF, SINGLE)
    with pytest.raises(ValueError, match="the dtype of the fit, float32, bfloat16 or float16"):
        check(HALF, HALF)


def test_a_weight_that_float16_cannot_hold_has_no_rounding_to_it(tmp_path):
    la = fitted(SINGLE, SINGLE)
    with torch.no_grad():
        next(p for n, p in la.logits_model.named_parameters() if "lora_A" in n)[0, 0] = 1e6
    la.fit(loader())
    la.save_pretrained(tmp_path)
    known = json.loads((tmp_path / "laplace_config.json").read_text())[ROUNDED]
    assert ["float16" in each for each in known.values()].count(False) == 1


def test_samples_are_compared_step_by_step():
    for values in ([], [("w", torch.tensor([0.5, -0.5, 3e-8, 0.0]))]):
        single = BaseSamples.of(values)
        assert BaseSamples.unpacked(single.packed()).are_those_of(single)
    numbers = torch.randn(64, generator=torch.Generator().manual_seed(0))
    kept = BaseSamples.of([("w", numbers)])
    assert BaseSamples.of([("w", numbers.half())]).are_those_of(kept)
    assert BaseSamples.of([("w", numbers.bfloat16())]).are_those_of(kept)
    next_ones = (numbers.bfloat16().view(torch.int16) + 1).view(torch.bfloat16)
    assert not BaseSamples.of([("w", next_ones)]).are_those_of(kept)
    assert not BaseSamples.of([("w", next_ones.half())]).are_those_of(kept)  # nearly all are apart
    assert not BaseSamples.of([("v", numbers)]).are_those_of(kept)
    assert not BaseSamples.of([("w", numbers[:32])]).are_those_of(kept)
