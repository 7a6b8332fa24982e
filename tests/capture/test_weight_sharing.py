"""Maps that run several times in a forward pass: ALBERT, which has one layer for all."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from laplace_lora import KronLoraLaplace, LoraGGN
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import LENGTHS, loader, token_batch
from support.models import ALBERT_ADAPTERS, albert
from support.references import assert_near, explicit_jacobians


@pytest.mark.parametrize("kind", ALBERT_ADAPTERS)
def test_jacobians_sum_over_the_calls(kind):
    model, batch = albert(kind), token_batch((4, 2, 5))
    _, blocks = LoraGGN(model, "classification").engine.jacobian_blocks(batch)
    assert_near(list(blocks), explicit_jacobians(model, batch))


@pytest.mark.parametrize("active,idle", [("lora", "dora"), ("dora", "lora")])
def test_an_idle_adapter_does_not_say_how_often_a_layer_runs(active, idle):
    """DoRA calls its maps once more; which calls count is the active adapter's affair."""
    expected, batch = albert(active, layers=2), token_batch((4, 2, 5))
    model = albert(active, layers=2)
    model.model.add_adapter("idle", ALBERT_ADAPTERS[idle])
    model.double().eval()
    kron = [
        LoraGGN(m, "classification").kron(batch, batch["labels"], N=3)[1] for m in (expected, model)
    ]
    for ours, theirs in zip(*(k.kfacs for k in kron), strict=True):
        assert_near(list(ours), list(theirs))


def test_expand_counts_the_tokens_of_all_calls():
    model, batch = albert(), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification")
    _, kron = backend.kron(batch, batch["labels"], N=len(LENGTHS))
    name, module = next((n, m) for n, m in model.named_modules() if n.endswith("lora_A.default"))
    factors = dict(zip([b.name for b in backend.blocks], kron.kfacs, strict=True))[f"{name}.weight"]
    calls = []
    handle = module.register_forward_hook(lambda m, args, out: calls.append((args[0], out)))
    f = model(batch)
    handle.remove()
    assert len(calls) == 3
    mask = batch["attention_mask"].double()
    inputs = sum(
        torch.einsum("nti,ntj,nt->ij", x, x, mask / mask.sum(1, keepdim=True)) for x, _ in calls
    ).detach() / (3 * len(LENGTHS))
    grads = 0
    for column in softmax_root(f.detach()):
        for _, out in calls:
            g = torch.autograd.grad(f, out, column, retain_graph=True)[0]
            grads = grads + torch.einsum("nti,ntj,nt->ij", g, g, mask)
    assert_near(factors, [grads, inputs])


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_do_not_depend_on_padding(approximation):
    la = KronLoraLaplace(
        albert().model, "classification", backend_kwargs={"kfac_approx": approximation}
    )
    la.fit(loader(1))
    reference = la.log_marginal_likelihood()
    la.fit(loader(7, pad_to=11))
    assert_near(la.log_marginal_likelihood(), reference)


def test_calls_on_each_others_outputs_and_calls_that_do_not_matter():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.float64)

        def forward(self, x):
            self.layer(x)  # goes nowhere
            return self.layer(torch.tanh(self.layer(self.layer(x))))

    torch.manual_seed(0)
    net = Chain()
    x = torch.randn(4, 3, dtype=torch.float64)
    jacobians, _ = LoraGGN(net, "classification").jacobians(x)
    weights = {k: p.detach() for k, p in net.named_parameters()}
    expected = jacrev(lambda w: functional_call(net, w, (x,)))(weights).values()
    assert_near(jacobians, torch.cat([j.flatten(2) for j in expected], -1))
    _, kron = LoraGGN(net, "classification").kron(x, torch.zeros(4, dtype=torch.long), N=4)
    assert all(factor.isfinite().all() for block in kron.kfacs for factor in block)
