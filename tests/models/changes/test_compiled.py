"""Compiled modules run as they were written, and are compiled again afterwards."""

import pytest
import torch
from torch import nn

from laplace_lora.models.changes.compiled import eager, is_compiled
from laplace_lora.models.changes.twins import _has_twin
from support.models import peft_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def called(module):
    module.compile(backend="eager")
    return module


def assigned(module):
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def called_with_a_forward_pass_of_its_own(module):
    """As accelerate's hooks assign one."""
    written = module.forward
    module.forward = lambda x: 2 * written(x)
    return called(module)


WAYS = {
    "wrapped": lambda module: torch.compile(module, backend="eager"),
    "called": called,
    "assigned": assigned,
    "called, with a forward pass of its own": called_with_a_forward_pass_of_its_own,
}


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of what it does itself
@pytest.mark.parametrize("way", WAYS)
def test_what_was_compiled_is_so_again(way):
    module = WAYS[way](nn.Linear(4, 2))
    expected, before = module(X), (vars(module).get("forward"), module._compiled_call_impl)
    assert is_compiled(module)
    with eager([module]):
        torch.testing.assert_close(module(X), expected)
        assert way == "wrapped" or not is_compiled(module)
    assert (vars(module).get("forward"), module._compiled_call_impl) == before
    torch.testing.assert_close(module(X), expected)


@pytest.mark.parametrize("way", [called, assigned])
def test_compiled_models_are_not_copied(way):
    model = peft_model("llama")
    assert _has_twin(model)
    way(model.get_base_model().model)
    assert not _has_twin(model)


def test_nothing_is_changed_where_nothing_is_compiled():
    module = nn.Linear(4, 2)
    with eager([module]):
        assert not is_compiled(module) and "forward" not in vars(module)
