"""Models of the last layer alone: one transformer, a head of its own."""

import copy
import pickle

import pytest
import torch
from laplace import marglik_training
from torch import nn

from laplace_lora import KronLoraLLLaplace, LogitsModel, LoraGGN
from laplace_lora.models.last_layer_model import LastLayerModel
from support.batches import loader, token_batch
from support.last_layer import PLAIN, by_name, last_layer_logits_model
from support.models import TARGETS, peft_model
from support.references import assert_near

BATCH = token_batch((4, 2, 6), seed=9)


def test_the_transformer_exists_once():
    model = last_layer_logits_model("llama-lm")
    frozen = {p.data_ptr() for p in model.parameters()}
    head = model.head_tensors()[0].numel()
    for structure in PLAIN:
        for route in ("lora_last_layer", "last_layer"):
            if (structure, route) == ("gp", "last_layer"):
                continue
            la = by_name(model, structure, route)
            la.fit(loader())
            own = [p for p in la.model.parameters() if p.data_ptr() not in frozen]
            assert sum(p.numel() for p in own) == head
            assert sum(p.numel() for p in la.model.parameters()) == head


def test_a_copy_has_a_head_of_its_own_and_nothing_else():
    model = last_layer_logits_model("bert").eval()
    assert type(copy.deepcopy(model)) is LogitsModel
    split = LastLayerModel(model)
    duplicate = copy.deepcopy(split)
    assert_near(duplicate(BATCH), model(BATCH))
    with torch.no_grad():
        duplicate.head.weight.zero_()
    assert split.head.weight.any() and model.head_tensors()[0].any()
    assert duplicate.source is model


@pytest.mark.parametrize("structure", PLAIN)
def test_making_one_leaves_the_random_generator_alone(structure):
    model = last_layer_logits_model("bert")
    before = torch.get_rng_state()
    by_name(model, structure, "lora_last_layer")
    assert torch.equal(torch.get_rng_state(), before)


def test_heads_that_are_not_linear_are_refused():
    adapted = peft_model("llama-lm", target_modules=["q_proj", "lm_head"])
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(adapted, "classification", target_ids=TARGETS).fit(loader())
    transformed = LogitsModel(peft_model("bert"), output=lambda out: out.logits.tanh())
    with pytest.raises(RuntimeError, match="not a linear map"):
        KronLoraLLLaplace(transformed, "classification").fit(loader())
    with pytest.raises(ValueError, match="no linear last layer"):
        KronLoraLLLaplace(LogitsModel(nn.Conv1d(2, 2, 1)), "classification")
    with pytest.raises(ValueError, match="cannot be differentiated"):
        KronLoraLLLaplace(peft_model("bert"), "classification", enable_backprop=True)


def train_on(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.endswith("bias"):
                parameter.mul_(1.3)


@pytest.mark.parametrize("structure", ["kron", "full"])
def test_a_head_of_before_the_model_was_trained_on_is_refused(structure):
    model = last_layer_logits_model("bert")
    split = LastLayerModel(model)
    la = by_name(split, structure, "last_layer", wrap=False)
    la.fit(loader())
    train_on(model)
    for ask in (lambda: la.fit(loader()), lambda: la(BATCH)):
        with pytest.raises(RuntimeError, match=r"was the model trained on\?.*a new posterior"):
            ask()
    late = by_name(split, structure, "last_layer", wrap=False)
    with pytest.raises(RuntimeError, match="make a new LastLayerModel"):
        late.fit(loader())
    split.take_head()
    fresh = by_name(model, structure, "last_layer")
    fresh.fit(loader())
    for other in (la, by_name(split, structure, "last_layer", wrap=False)):
        other.fit(loader())
        assert_near(other.log_likelihood, fresh.log_likelihood)
        assert_near(other(BATCH), fresh(BATCH))


def test_heads_that_move_are_the_ones_they_were():
    model = last_layer_logits_model("bert")
    split = LastLayerModel(model)
    expected = split(BATCH)
    assert_near(pickle.loads(pickle.dumps(split))(BATCH), expected)
    with torch.no_grad():
        split.head.weight.mul_(2)  # a sample, or training of the head alone
    assert not torch.allclose(split(BATCH), expected)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        model.to(dtype)
        split.to(torch.promote_types(dtype, torch.float32))
        assert split(BATCH).isfinite().all()
    twin = copy.deepcopy([model, split])[1]
    train_on(model)
    assert twin(BATCH).isfinite().all()  # its transformer is another one
    with pytest.raises(RuntimeError, match="make a new LastLayerModel"):
        split(BATCH)


def test_marginal_likelihood_training_of_the_head_goes_on():
    split = LastLayerModel(last_layer_logits_model("bert"))
    before = split.head.weight.clone()
    options = {"n_epochs": 2, "marglik_frequency": 1, "optimizer_kwargs": {"lr": 1e-2}}
    la, trained, *_ = marglik_training(
        split, loader(), "classification", "diag", backend=LoraGGN, **options
    )
    assert not torch.equal(trained.head.weight, before)
    assert la(BATCH).isfinite().all()
