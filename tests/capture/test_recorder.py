"""What layers receive and return in a forward pass, and what cannot be recorded."""

import gc
import weakref

import pytest
import torch
from torch import nn

from laplace_lora import LogitsModel, LoraGGN
from laplace_lora.adapters.discovery import trainable_maps
from laplace_lora.capture.recorder import record
from support.batches import token_batch
from support.models import TARGETS, peft_model
from support.preferences import pair_batch
from support.references import assert_near, explicit_jacobians

LENGTHS = (3, 6, 4, 6, 1)
DECODERS = ["llama", "gpt2"]


def test_inputs_cast_for_each_adapter_are_recognised():
    """A half-precision model with single-precision adapters casts its input once a projection."""
    model = peft_model("llama-lm", dtype=torch.bfloat16, target_modules=["q_proj", "v_proj"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    tape = record(LogitsModel(model, target_ids=TARGETS).eval(), *maps_and_batch(model))
    named = {linear.name: i for i, linear in enumerate(tape.maps)}
    groups = {name: tape.maps[tape.input_groups[i]].name for name, i in named.items()}
    for name, first in groups.items():
        assert first == name.replace("v_proj.lora_A", "q_proj.lora_A")
    assert tape.inputs[0].dtype == torch.float32


def maps_and_batch(model):
    return trainable_maps(model)[0], token_batch(LENGTHS)


def test_modules_that_run_twice_or_never_are_named():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.idle = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x) + self.layer(x.unsqueeze(1).repeat(1, 2, 1)).sum(1)

    net = Twice()
    with pytest.raises(RuntimeError, match="'idle' did not run"):
        net.layer.requires_grad_(False)
        LoraGGN(net, "classification").jacobians(torch.randn(2, 3))
    net.layer.requires_grad_(True)
    net.idle.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"'layer' ran 2 times .* of different shapes"):
        LoraGGN(net, "classification").jacobians(torch.randn(2, 3))


def test_inputs_without_a_batch_dimension_are_named():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(x.reshape(-1, 3)).reshape(len(x), -1)

    said = r"'layer' received an input of shape \(4, 3\).*diag' \(an exact posterior stays exact\)"
    net, x = Folded().double(), torch.randn(2, 6).double()
    with pytest.raises(RuntimeError, match=said):
        LoraGGN(net, "classification").jacobians(x)
    backend = LoraGGN(net, "classification", uncovered="diag")
    assert_near(list(backend.engine.jacobian_blocks(x)[1]), explicit_jacobians(net, x))


def test_masks_that_do_not_fit_the_tokens_are_refused():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, batch):
            return self.layer(batch["x"]).mean(1)

    batch = {"x": torch.randn(2, 5, 3), "attention_mask": torch.ones(2, 4)}
    with pytest.raises(RuntimeError, match="'layer' received 5 tokens"):
        LoraGGN(Pooled(), "classification").kron(batch, torch.tensor([0, 1]), N=2)


def test_projections_share_the_inputs_of_both_texts():
    model = LogitsModel(peft_model("llama", num_labels=1, modules_to_save=None)).eval()
    maps = LoraGGN(model, "classification").maps
    for dtype in (torch.float64, torch.bfloat16):  # cast for each adapter
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
        groups = record(model, maps, pair_batch()).input_groups
        named = {maps[i].name: maps[group].name for i, group in enumerate(groups)}
        shared = {name: first for name, first in named.items() if "v_proj.lora_A" in name}
        assert len(shared) == 2
        assert all(first == name.replace("v_proj", "q_proj") for name, first in shared.items())


def test_layers_that_run_unevenly_on_the_two_texts_are_named():
    class Uneven(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 1)

        def forward(self, batch):
            chosen, rejected = batch["x_chosen"], batch["x_rejected"]
            twice = self.layer(chosen) + self.layer(chosen)
            return torch.cat([self.layer(rejected), twice], -1)

    batch = {"x_chosen": torch.randn(2, 3), "x_rejected": torch.randn(2, 3)}
    with pytest.raises(RuntimeError, match="'layer' ran 3 times"):
        LoraGGN(Uneven(), "classification").jacobians(batch)


@pytest.mark.parametrize("name", DECODERS)
def test_a_score_head_sees_one_token(name):
    model = peft_model(name).eval()
    backend = LoraGGN(LogitsModel(model), "classification")
    (index,) = (i for i, linear in enumerate(backend.maps) if "score" in linear.name)
    from laplace_lora.capture.recorder import record

    tape = record(backend.model, backend.maps, token_batch(LENGTHS))
    assert tape.inputs[index].shape == (5, 1, 16)


def test_a_recorded_graph_is_freed_without_the_garbage_collector():
    model = LogitsModel(peft_model("bert")).eval()
    gc.disable()
    try:
        tape = record(model, trainable_maps(model)[0], token_batch(LENGTHS))
        output = weakref.ref(tape._output)
        backward = weakref.ref(tape._gradients[0][0])
        del tape
        assert output() is None and backward() is None
    finally:
        gc.enable()
