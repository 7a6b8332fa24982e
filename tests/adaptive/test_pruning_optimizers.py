"""Optimisers that go on with a pruned adapter."""

import pytest
import torch

from laplace_lora import DiagLoraLaplace
from laplace_lora.adaptive import IVON, prune_adapter
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
