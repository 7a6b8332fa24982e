"""Files know tensors by their names, whatever order PEFT has left them in."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from laplace_lora import DiagLoraLaplace
from laplace_lora.storage.base_samples import BASE_SAMPLES, BaseSamples
from laplace_lora.storage.identity import base_in_use, identity
from support.batches import loader, token_batch
from support.experts import experts_model
from support.forgery import forge
from support.models import base_model, excite

BATCH = token_batch((4, 2, 5), seed=3)


def plain_weights():
    lora = LoraConfig(r=2, target_modules=[], target_parameters=["query.weight"])
    return excite(get_peft_model(base_model("bert"), lora)).double().eval()


MODELS = {
    "linear": plain_weights,
    "mixtral": lambda: experts_model("mixtral", ["gate_up_proj"]),
    "gpt_oss": lambda: experts_model("gpt_oss"),
}


def fitted(model):
    la = DiagLoraLaplace(model, "classification", uncovered="diag")
    la.fit(loader())
    return la


def names(model):
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_posterior_over_adapted_parameters_loads_without_a_pass(make, tmp_path):
    """PEFT registers them anew at each pass, behind their siblings."""
    model, again, other = make(), make(), make()
    la = fitted(model)
    la.save_pretrained(tmp_path, precision="exact")
    assert names(again) != names(model) and sorted(names(again)) == sorted(names(model))
    loaded = DiagLoraLaplace.from_pretrained(again, tmp_path)
    assert torch.equal(loaded(BATCH), la(BATCH))
    assert names(again) == names(model)
    assert torch.equal(DiagLoraLaplace.from_pretrained(again, tmp_path)(BATCH), la(BATCH))
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "base_layer" in n).mul_(1.1)
    with pytest.raises(ValueError, match="the base model differs"):
        DiagLoraLaplace.from_pretrained(other, tmp_path)


def test_posteriors_merge_before_and_after_a_pass():
    one = fitted(plain_weights())
    two = DiagLoraLaplace(plain_weights(), "classification", uncovered="diag")
    two.load_state_dict(one.state_dict())
    assert names(one.logits_model) != names(two.logits_model)
    one.merge([two])
    assert one.n_data == 2 * two.n_data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_file_that_hashed_tensors_in_the_models_order_loads(dtype, tmp_path):
    """As earlier versions wrote it; the adapter's other tensors are out of order as well."""

    def make():
        lora = LoraConfig(r=2, target_modules=["query", "value"], modules_to_save=["classifier"])
        return excite(get_peft_model(base_model("bert"), lora)).eval()

    def half(model):
        for name, p in model.named_parameters():
            if "lora_" not in name and "modules_to_save" not in name:
                p.data = p.data.to(dtype)
        return model

    la = DiagLoraLaplace(make(), "classification", modules=["query"])
    la.fit(loader())
    la.save_pretrained(tmp_path, precision="exact")
    earlier = identity(la.parts, by_name=False)
    assert all(earlier[k] != identity(la.parts)[k] for k in ("adapter", "base", "base_in_use"))
    samples = BaseSamples.of(base_in_use(la.parts, by_name=False)).packed()
    forge(tmp_path, **earlier, **{BASE_SAMPLES: samples})
    DiagLoraLaplace.from_pretrained(half(make()), tmp_path)
    other = half(make())
    with torch.no_grad():
        next(p for n, p in other.named_parameters() if "LayerNorm.weight" in n).mul_(1.1)
    with pytest.raises(ValueError, match="the base model differs"):
        DiagLoraLaplace.from_pretrained(other, tmp_path)
