"""Models spread over devices by accelerate: what one processor can show, with weights on disk.

Everything that is summed or compared comes together on the device of the model's first parameter.
"""

import pytest
import torch
from accelerate import dispatch_model
from peft import get_peft_model
from torch import nn

from laplace_lora import DiagLoraLaplace, FullLoraLLLaplace, KronLoraLaplace, LogitsModel
from laplace_lora.curvature.batch_curvature import add_factors, assembled
from laplace_lora.curvature.kfac import KfacSums
from support.batches import loader, token_batch
from support.models import TARGETS, adapter_config, base_model, excite
from support.posteriors import LOW
from support.references import assert_near

BATCH = token_batch((4, 2), seed=3)
BODIES = {"bert": "bert.encoder.layer", "llama": "model.layers", "llama-lm": "model.layers"}


def model_of(name, offloaded=None, folder=None, layers=(0,)):
    """Adapters on some layers; one layer's weights on disk, brought back for each pass."""
    base = base_model(name)
    if offloaded is not None:
        body = BODIES[name]
        names = [n for n, m in base.named_modules() if not list(m.children())]
        places = {n: "cpu" for n in names if not n.startswith(body)}
        places |= {f"{body}.{i}": "disk" if i == offloaded else "cpu" for i in range(2)}
        base = dispatch_model(base, places, main_device="cpu", offload_dir=folder, force_hooks=True)
    config = adapter_config(name, layers_to_transform=list(layers))
    return excite(get_peft_model(base, config))


@pytest.mark.parametrize("cls,kwargs", [(KronLoraLaplace, LOW), (DiagLoraLaplace, {})])
@pytest.mark.parametrize("name", BODIES)
def test_weights_on_disk_change_nothing(name, cls, kwargs, tmp_path):
    targets = TARGETS if name.endswith("-lm") else None
    model = model_of(name, 1, tmp_path / "weights")
    assert any(p.device.type == "meta" for p in model.parameters())
    spread, whole = (
        cls(m, "classification", target_ids=targets, uncovered="diag", **kwargs)
        for m in (model, model_of(name))
    )
    for la in (spread, whole):
        la.fit(loader())
    assert_near(spread.log_marginal_likelihood(), whole.log_marginal_likelihood(), 1e-5)
    assert_near(spread(BATCH), whole(BATCH), 1e-5)
    spread.save_pretrained(tmp_path, precision="exact")
    again = cls.from_pretrained(model, tmp_path)
    assert torch.equal(again(BATCH), spread(BATCH))


def test_the_last_layer_of_a_spread_model(tmp_path):
    spread, whole = (
        FullLoraLLLaplace(m, "classification")
        for m in (model_of("bert", 1, tmp_path), model_of("bert"))
    )
    for la in (spread, whole):
        la.fit(loader())
    assert_near(spread(BATCH), whole(BATCH), 1e-5)


def test_offloaded_adapters_are_refused_by_name(tmp_path):
    model = model_of("bert", 1, tmp_path, layers=(0, 1))
    with pytest.raises(
        RuntimeError, match=r"layer\.1\..*lora_A.* is offloaded; keep it on a device"
    ):
        KronLoraLaplace(model, "classification")


def test_an_offloaded_first_parameter_is_on_no_device():
    model = nn.Sequential(nn.Linear(2, 2, device="meta"), nn.Linear(2, 2))
    assert LogitsModel(model).device.type == "cpu"


def test_sums_come_together_where_the_outputs_are():
    """The device is fixed by the outputs, whatever those of the layers."""
    la = KronLoraLaplace(model_of("bert"), "classification", **LOW)
    la.fit(loader())
    _, sums = add_factors(la.engine, BATCH, BATCH["labels"], la.structure.spec)
    assert isinstance(sums, KfacSums)
    sums.device = torch.device("meta")
    kron = assembled(la.engine, sums, 2, "isotropic")
    assert {t.device.type for factor in kron.factors() for t in factor.tensors()} == {"meta"}
