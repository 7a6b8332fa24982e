"""With which weights an adapter changes nothing."""

import re

import peft
import pytest
import torch
from peft import get_peft_model

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.adapters import start
from laplace_lora.models.start import before_adapter
from support.batches import loader, token_batch
from support.models import base_model, excite
from support.references import assert_near

BATCH = token_batch((4, 2, 5), seed=3)
MODULES = ["query", "value"]
OUTPUT = ["output.dense"]
TUNERS = {  # of PEFT, and which of their tensors are set
    "AdaLora": ({"init_r": 3, "target_r": 2, "total_step": 9, "tfinal": 1}, {"lora_B"}),
    "BOFT": ({"boft_block_size": 4}, {"boft_R", "boft_s"}),
    "C3A": ({"block_size": 4}, {"c3a_kernel"}),
    "FourierFT": ({"n_frequency": 20}, {"fourierft_spectrum"}),
    "Gralora": ({"r": 4, "gralora_k": 2, "hybrid_r": 2}, {"gralora_B", "gralora_B_general"}),
    "Hira": ({"r": 2}, {"hira_B"}),
    "IA3": ({"target_modules": ["key", *OUTPUT], "feedforward_modules": OUTPUT}, {"ia3_l"}),
    "LoHa": ({"r": 2}, {"hada_w2_b"}),
    "LoKr": ({"r": 2}, {"lokr_w1"}),
    "Miss": ({"r": 4}, {"miss_block"}),
    "OFT": ({"oft_block_size": 4, "r": 0}, {"oft_R"}),
    "RandLora": ({"r": 4}, {"randlora_lambda"}),
    "Road": ({"group_size": 4}, {"road_theta", "road_alpha"}),
    "Shira": ({"r": 2}, {"shira_weight"}),
    "Vera": ({"r": 2}, {"vera_lambda_b"}),
    "WaveFT": ({"n_frequency": 20}, {"waveft_spectrum"}),
}
OTHERS = {"HRA": ({"r": 2}, set())}


def trained(name):
    """A tiny BERT whose adapter and head are somewhere generic."""
    torch.manual_seed(0)
    config = {"target_modules": MODULES, **{**TUNERS, **OTHERS}[name][0]}
    tuner = getattr(peft, f"{name}Config")(task_type="SEQ_CLS", **config)
    return excite(get_peft_model(base_model("bert"), tuner)).double().eval()


@pytest.mark.parametrize("name", TUNERS)
@pytest.mark.filterwarnings("ignore")
def test_the_base_model_answers_and_the_adapter_would_change_it(name):
    model = trained(name)
    expected = base_model("bert").double().eval()
    head = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    expected.classifier.load_state_dict(head.state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with before_adapter(LogitsModel(model)) as (base, at_start), at_start():
        answer = base(BATCH)
        tensors = [parameter for parameter, _ in start.at_base(base)]
        gradients = torch.autograd.grad(answer[:, 0].sum(), tensors)
    assert_near(answer, expected(**BATCH).logits)
    assert not torch.allclose(LogitsModel(model)(BATCH), answer, rtol=1e-9)
    assert all(gradient.any() for gradient in gradients)
    moved = {id(parameter) for parameter, _ in start.at_base(model)}
    names = TUNERS[name][1]
    named = model.named_parameters()
    assert moved == {id(p) for key, p in named if p.requires_grad and names & {*key.split(".")}}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def fitted(model):
    la = KronLoraLaplace(LogitsModel(model), "classification", uncovered="diag")
    la.fit(loader())
    return la


def test_leave_one_out_is_the_default_for_other_tuners():
    la = fitted(trained("Vera"))
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"


@pytest.mark.parametrize(
    "name,reason", [("HRA", "with which weights hra changes nothing in '.*query'")]
)
def test_tuners_that_do_not_start_at_the_base_model_fall_back(name, reason):
    la = fitted(trained(name))
    la.optimize_prior_precision()
    assert la.tuning.method == "marglik" and re.search(reason, la.tuning.reason)
    with pytest.raises(ValueError, match=reason):
        la.optimize_prior_precision(method="loo")


def test_mica_is_said_to_start_at_the_base_model():
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights="mica")
    la = fitted(get_peft_model(base_model("bert"), config))
    la.optimize_prior_precision()
    reason = "starts at the base model but is not linearised there: its lora_B, which stays frozen"
    assert la.tuning.method == "marglik" and reason in la.tuning.reason


def test_layers_that_do_change_something_are_found(monkeypatch):
    """What the table says of a tuner is verified."""
    monkeypatch.setitem(start.UNCHANGED, "vera_lambda_b", 0.5)
    model = trained("Vera")
    la = fitted(model)
    la.optimize_prior_precision()
    reason = r"vera changes the outputs of '.*query'"
    assert la.tuning.method == "marglik" and re.search(reason, la.tuning.reason)
    with pytest.raises(ValueError, match=reason):
        la.optimize_prior_precision(method="loo")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["Lora", "IA3"])
def test_layers_of_idle_adapters_alone_are_left_out(name):
    """PEFT calls the active adapter active in layers that have another one only."""
    tuner = getattr(peft, f"{name}Config")
    more = {"feedforward_modules": []} if name == "IA3" else {"r": 2}
    configs = [tuner(task_type="SEQ_CLS", target_modules=[m], **more) for m in MODULES]
    model = get_peft_model(base_model("bert"), configs[0])
    model.add_adapter("second", configs[1])
    model.set_adapter("second")
    la = fitted(excite(model).double().eval())
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"


def test_layers_that_see_nothing_are_no_reason():
    model = trained("Vera")
    layer = model.get_submodule("base_model.model.bert.encoder.layer.0.attention.self.query")
    with start.checked_unchanged(model) as is_checked:
        assert is_checked
        layer(torch.zeros(0, 3, layer.in_features).double())


def test_rounding_hides_no_change_in_half_precision(monkeypatch):
    monkeypatch.setitem(start.UNCHANGED, "ia3_l", 1.1)
    with (
        before_adapter(trained("IA3").bfloat16()) as (base, at_start),
        at_start(),
        pytest.raises(ValueError, match="changes the outputs"),
        start.checked_unchanged(base),
    ):
        base(**BATCH)


def test_an_orthogonal_start_is_the_base_model():
    """Neither factor is zero, and their product is."""
    config = peft.LoraConfig(r=4, target_modules=MODULES, init_lora_weights="orthogonal")
    model = get_peft_model(base_model("bert").double(), config).eval()
    weights = dict(model.named_parameters())
    assert all(weights[name].abs().max() > 0.01 for name in weights if "lora_" in name)
    expected = base_model("bert").double().eval()(**BATCH).logits
    assert_near(model(**BATCH).logits, expected, 1e-6)
    excite(model)
    with before_adapter(LogitsModel(model)) as (base, at_start), at_start():
        assert_near(base(BATCH), expected, 1e-12)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    la.optimize_prior_precision()
    assert la.tuning.method == "loo"
