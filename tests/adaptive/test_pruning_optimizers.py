"""Optimisers that go on with a pruned adapter."""

import pytest
import torch
from transformers.optimization import Adafactor

from laplace_lora import DiagLoraLaplace
from laplace_lora.adaptive import IVON, prune_adapter, remove_pruned_triplets
from support.adalora import tiny_adalora
from support.batches import loader, token_batch
from support.models import peft_model


def stepped(model, optimizer):
    optimizer.zero_grad()
    model(**token_batch()).loss.backward()
    optimizer.step()


def trained(make, model):
    """A posterior of a model whose optimiser has taken a step."""
    model.eval()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    stepped(model, optimizer)
    la = DiagLoraLaplace(model, "classification")
    la.fit(loader())
    return la, optimizer


def lora():
    return peft_model("bert", r=4)


OPTIMIZERS = [
    pytest.param(lambda ps: torch.optim.AdamW(ps, lr=1e-2), id="AdamW"),
    pytest.param(lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9), id="momentum"),
    pytest.param(lambda ps: torch.optim.RMSprop(ps, lr=1e-3), id="RMSprop"),
]


@pytest.mark.parametrize("make", OPTIMIZERS)
@pytest.mark.parametrize("make_model", [lora, lambda: tiny_adalora("bert", torch.float64)])
def test_an_optimiser_goes_on_with_what_is_kept(make, make_model):
    model = make_model()
    la, optimizer = trained(make, model)
    before = {
        p: {k: v.clone() for k, v in state.items() if isinstance(v, torch.Tensor) and v.ndim}
        for p, state in optimizer.state.items()
    }
    prune_adapter(model, la, 2, optimizer=optimizer)
    shrunk = 0
    for p, state in optimizer.state.items():
        for key, old in before[p].items():
            assert state[key].shape == p.shape
            if old.shape != p.shape:  # each row or column that is left was one before
                shrunk += 1
                side = int(old.shape[0] == p.shape[0])
                rows = set(map(tuple, old.movedim(side, 0).tolist()))
                assert set(map(tuple, state[key].movedim(side, 0).tolist())) <= rows
    assert shrunk
    weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    stepped(model, optimizer)
    now = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(weights, now, strict=True) if a.numel())


def test_without_it_the_next_step_fails():
    model = lora()
    la, optimizer = trained(lambda ps: torch.optim.AdamW(ps), model)
    prune_adapter(model, la, 2)
    with pytest.raises(RuntimeError, match="must match the size"):
        stepped(model, optimizer)


def test_an_ivon_has_no_optimiser_beside_it():
    model = lora()
    ivon = IVON([p for p in model.parameters() if p.requires_grad], ess=7)
    with pytest.raises(ValueError, match="leave `optimizer` out"):
        prune_adapter(model, ivon, 2, optimizer=torch.optim.SGD(model.parameters(), lr=1))


class EightBit(torch.optim.Optimizer):
    """Keeps a momentum in eight bits, with a scale for all of it, as bitsandbytes for a block."""

    def __init__(self, parameters, scale="absmax"):
        super().__init__(parameters, {})
        self.scale = scale

    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            largest = p.grad.abs().max()
            quantised = (p.grad / largest * 127).round().to(torch.int8).view(torch.uint8)
            self.state[p] = {"state1": quantised, self.scale: largest.expand(2)}


class Subclass(torch.Tensor):
    """As torchao's states: says it is floating-point, and of the parameter's shape."""


class Wrapped(EightBit):
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p]["exp_avg"] = p.grad.clone().as_subclass(Subclass)


class Preconditioned(EightBit):
    """As Shampoo and SOAP, with a list of matrices beside a momentum."""

    def step(self):
        for p in (p for group in self.param_groups for p in group["params"]):
            self.state[p] = {"step": torch.tensor(1.0), "exp_avg": p.grad.clone()}
            self.state[p]["sides"] = [torch.eye(size) for size in p.shape]


def adafactor(parameters):
    return Adafactor(parameters, lr=1e-2, relative_step=False, scale_parameter=False)


def parts(model, optimizer):
    """Copies of the adapter's tensors, their gradients and the optimiser's state."""
    tensors = [t.detach().clone() for _, t in model.named_parameters()]
    tensors += [p.grad.clone() for p in model.parameters() if p.grad is not None]
    states = [value for state in optimizer.state.values() for value in state.values()]
    return tensors + [value.clone() for value in states if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(adafactor, "exp_avg_sq_row", id="transformers' Adafactor"),
        pytest.param(torch.optim.Adafactor, "row_var", id="torch's Adafactor"),
        pytest.param(EightBit, "state1", id="eight bits"),
        pytest.param(Wrapped, "exp_avg", id="eight bits in a subclass"),
        pytest.param(Preconditioned, "sides", id="matrices in a list"),
    ],
)
@pytest.mark.parametrize("make_model", [lora, lambda: tiny_adalora("bert", torch.float64)])
def test_a_state_that_cannot_shrink_is_refused_before_anything_changes(make, name, make_model):
    model = make_model()
    la, optimizer = trained(make, model)
    before = parts(model, optimizer)
    prunings = [lambda: prune_adapter(model, la, 2, optimizer=optimizer)]
    if make_model is not lora:
        prunings.append(lambda: remove_pruned_triplets(model, optimizer))
    for prune in prunings:
        kind = type(optimizer).__name__
        with pytest.raises(ValueError, match=f"state of {kind} cannot shrink.*'{name}'.*new one"):
            prune()
    after = parts(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    stepped(model, optimizer)


def test_a_search_direction_over_all_weights_is_refused_as_well():
    model = lora().eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    la, _ = trained(torch.optim.SGD, model)
    optimizer = torch.optim.LBFGS(parameters)  # keeps it beside its first parameter

    def loss():
        optimizer.zero_grad()
        value = model(**token_batch()).loss
        value.backward()
        return value

    optimizer.step(loss)
    la.fit(loader())
    with pytest.raises(ValueError, match="state of LBFGS cannot shrink"):
        prune_adapter(model, la, 2, optimizer=optimizer)


def test_what_is_no_optimiser_is_refused_before_anything_changes():
    model = tiny_adalora("bert", torch.float64)
    la, optimizer = trained(torch.optim.AdamW, model)
    before = parts(model, optimizer)
    for prune in (
        lambda: prune_adapter(model, la, 2, optimizer=[optimizer]),
        lambda: remove_pruned_triplets(model, [optimizer]),
    ):
        with pytest.raises(TypeError, match="must be one optimiser, got list"):
            prune()
    assert all(map(torch.equal, before, parts(model, optimizer)))


def test_an_optimiser_within_another_is_refused():
    """As in `ZeroRedundancyOptimizer`, whose own state is empty."""

    class Outer(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})
            self.optim = torch.optim.AdamW(params, lr=1e-2)

        def step(self):
            self.optim.step()

    model = lora()
    la, optimizer = trained(Outer, model)
    shapes = [p.shape for p in model.parameters()]
    with pytest.raises(ValueError, match="state of Outer is in another optimiser"):
        prune_adapter(model, la, 2, optimizer=optimizer)
    assert [p.shape for p in model.parameters()] == shapes
