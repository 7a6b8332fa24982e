"""A posterior notices at its next call that the model's weights are no longer those of the fit."""

import copy

import pytest
import torch
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

from laplace_lora import DiagLoraLaplace, FullLoraLaplace, KronLoraLaplace, KronLoraLLLaplace
from support.batches import loader, token_batch
from support.models import excite, peft_model

BATCH = token_batch((4, 2, 5))


@pytest.mark.parametrize("kind", [KronLoraLaplace, DiagLoraLaplace, KronLoraLLLaplace])
def test_weights_that_were_trained_on_are_refused_until_they_come_back(kind, tmp_path):
    model = peft_model("bert")
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    name = "base_model.model.classifier.modules_to_save.default.weight"
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        model.get_parameter(name).add_(0.01)
    for call in (
        lambda: la(BATCH),
        lambda: la.predict(BATCH),
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(loader(), override=False),
    ):
        with pytest.raises(RuntimeError, match="have changed since the posterior was fitted"):
            call()
    model.load_state_dict(weights)
    assert torch.equal(la(BATCH), expected)


@pytest.mark.parametrize("kind", [KronLoraLaplace, KronLoraLLLaplace])
def test_weights_written_through_data_are_refused_though_their_version_is_the_same(kind):
    model = peft_model("bert")
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    weight = model.get_parameter("base_model.model.classifier.modules_to_save.default.weight")
    version, values = weight._version, weight.detach().clone()
    weight.data.mul_(2)
    assert weight._version == version
    with pytest.raises(RuntimeError, match="have changed since the posterior was fitted"):
        la(BATCH)
    weight.data.copy_(values)
    assert torch.equal(la(BATCH), expected)


@pytest.mark.parametrize(
    "kind, options, changed",
    [
        (KronLoraLaplace, {}, "bert.embeddings.word_embeddings.weight"),
        (KronLoraLaplace, {"modules": "lora_B"}, "query.lora_A"),
        (KronLoraLLLaplace, {}, "query.lora_B"),
        (KronLoraLLLaplace, {}, "bert.embeddings.word_embeddings.weight"),
    ],
)
def test_weights_that_are_not_covered_are_watched_too(kind, options, changed):
    model = peft_model("bert")
    la = kind(model, "classification", **options)
    la.fit(loader())
    expected, weights = la(BATCH), copy.deepcopy(model.state_dict())
    state = la.state_dict()
    weight = next(p for n, p in model.named_parameters() if changed in n)
    with torch.no_grad():
        weight.mul_(1.1)
    with pytest.raises(RuntimeError, match=f"weights '.*{changed}.*does not cover, have changed"):
        la(BATCH)
    other = kind(model, "classification", **options)
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="does not cover, have changed"):
        other(BATCH)
    model.load_state_dict(weights)
    assert torch.equal(la(BATCH), expected)
    other.load_state_dict({key: value for key, value in state.items() if key != "buffers"})
    assert torch.equal(other(BATCH), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_was_merged_and_unmerged_is_no_change(dtype):
    model = peft_model("bert", dtype=torch.float32)
    la = KronLoraLaplace(model.to(dtype), "classification")
    la.fit(loader())
    la(BATCH)
    query = model.base_model.model.bert.encoder.layer[0].attention.self.query.base_layer
    before = query.weight.detach().clone()
    model.merge_adapter()
    model.unmerge_adapter()
    assert not torch.equal(query.weight, before)
    la(BATCH)


@pytest.mark.parametrize("kind", [KronLoraLaplace, DiagLoraLaplace])
def test_a_fit_again_is_in_the_dtype_that_the_model_is_in_now(kind):
    model = peft_model("bert")
    la = kind(model, "classification", prior_precision=2.0)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        la.fit(loader())
        new = kind(model, "classification", prior_precision=2.0)
        new.fit(loader())
        assert torch.equal(la(BATCH), new(BATCH))
        assert torch.equal(la.log_marginal_likelihood(), new.log_marginal_likelihood())


def test_an_idle_adapter_and_a_new_one_are_no_change():
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("default")
    assert torch.equal(la(BATCH), expected)
    model.delete_adapter("other")
    assert torch.equal(la(BATCH), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [KronLoraLaplace, FullLoraLaplace, KronLoraLLLaplace])
def test_weights_rounded_since_the_fit_are_pointed_out_once_and_get_no_data_added(kind, dtype):
    model = peft_model("bert", dtype=torch.float32)
    la = kind(model, "classification")
    la.fit(loader())
    model.to(dtype)
    with pytest.warns(UserWarning, match=r"coarser dtype since: they differ by \d\.\de-0\d"):
        la(BATCH)
    la.predict(BATCH)  # says nothing any more
    with pytest.raises(RuntimeError, match=r"data cannot be added: .* to a coarser dtype"):
        la.fit(loader(), override=False)
    assert la.n_data == 7
    model.float()  # but the digits are gone
    with pytest.raises(RuntimeError, match="have changed since the posterior was fitted"):
        la(BATCH)
    excite(model)
    la.fit(loader())
    model.to(dtype)
    with pytest.warns(UserWarning, match="coarser dtype since"):
        la(BATCH)


def test_weights_that_a_dtype_holds_exactly_are_no_change():
    model = peft_model("bert", dtype=torch.bfloat16)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    for dtype in (torch.float32, torch.float16):
        la(BATCH)
        model.to(dtype)
    la(BATCH)
    model.to(torch.bfloat16)
    la.fit(loader(), override=False)


def test_a_new_fit_is_no_change():
    model = peft_model("bert", dtype=torch.float32)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    with torch.no_grad():
        for parameter in la.params:
            parameter.mul_(0.5)
    la.fit(loader())
    la(BATCH)


def test_rounding_is_no_change():
    la = KronLoraLaplace(peft_model("bert", dtype=torch.float32), "classification")
    la.fit(loader())
    weight, before = la.params[0], la.params[0].detach().clone()
    with torch.no_grad():
        weight += 1
        weight -= 1
    assert not torch.equal(weight, before)
    la(BATCH)


@pytest.mark.parametrize("kind", [KronLoraLaplace, FullLoraLaplace, KronLoraLLLaplace])
def test_double_precision_is_another_model(kind):
    model = peft_model("bert", dtype=torch.float32)
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    model.double()
    with pytest.raises(RuntimeError, match="the posterior was fitted in"):
        la(BATCH)
    model.float()
    torch.testing.assert_close(la(BATCH), expected)


def rescale(model, factor):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.set_scale("default", factor)


@pytest.mark.parametrize("kind", [KronLoraLaplace, FullLoraLaplace, KronLoraLLLaplace])
def test_another_scaling_of_the_adapter_is_refused_until_it_comes_back(kind, tmp_path):
    model = peft_model("bert")
    la = kind(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    rescale(model, 3.0)
    calls = (
        lambda: la(BATCH),
        la.optimize_prior_precision,
        lambda: la.save_pretrained(tmp_path),
        lambda: la.fit(loader(), override=False),
    )
    for call in calls:
        with pytest.raises(RuntimeError, match=r"scaling of '.*query.* has changed since"):
            call()
    rescale(model, 1.0)
    assert torch.equal(la(BATCH), expected)


def test_a_scaling_that_peft_made_a_tensor_is_watched():
    """As for compiled models that swap adapters."""
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    expected = la(BATCH)
    prepare_model_for_compiled_hotswap(model, target_rank=2, config=model.peft_config)
    assert torch.equal(la(BATCH), expected)
    refused = pytest.raises(RuntimeError, match=r"scaling of '.*query.* has changed since")
    with rescale_adapter_scale(model, 0.4), refused:
        la(BATCH)
    assert torch.equal(la(BATCH), expected)


def test_a_state_keeps_the_scaling_of_its_fit(tmp_path):
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    state = la.state_dict()
    loaded = KronLoraLaplace.from_pretrained(model, tmp_path)
    rescale(model, 3.0)
    with pytest.raises(RuntimeError, match="scaling of"):
        loaded(BATCH)
    other = KronLoraLaplace(model, "classification")
    other.load_state_dict(state)
    with pytest.raises(RuntimeError, match="scaling of"):
        other(BATCH)
    rescale(model, 1.0)
    assert torch.equal(other(BATCH), la(BATCH))
    other.load_state_dict({key: value for key, value in state.items() if key != "adapter"})
    assert torch.equal(other(BATCH), la(BATCH))


def test_what_is_written_through_data_is_noticed_where_it_is_not_covered(tmp_path):
    """As moving averages of weights are; of the adapter's weights at once."""
    model = peft_model("bert")
    la = KronLoraLaplace(model, "classification", modules="lora")
    la.fit(loader())
    expected = la(BATCH)
    head = model.base_model.model.classifier.modules_to_save["default"].weight
    head.data.mul_(2)
    with pytest.raises(RuntimeError, match="which the posterior does not cover"):
        la(BATCH)
    head.data.div_(2)
    assert torch.equal(la(BATCH), expected)
    frozen = model.get_base_model().bert.encoder.layer[0].output.dense.weight
    frozen.data.mul_(2)
    for call in (la.optimize_prior_precision, lambda: la.save_pretrained(tmp_path)):
        with pytest.raises(RuntimeError, match="which the posterior does not cover"):
            call()
