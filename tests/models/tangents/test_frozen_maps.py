"""Frozen linear layers carry tangents as before, without a derivative of their weights."""

import torch
from torch import nn
from torch.func import functional_call, jvp
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from laplace_lora.models.tangents.frozen_maps import differentiate_inputs_only


class Doubled(nn.Module):
    def forward(self, w):
        return 2 * w


class Tripled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Net(nn.Module):
    """A frozen layer between two that move, one of which shares its weight with another."""

    def __init__(self):
        super().__init__()
        self.first, self.frozen = nn.Linear(3, 4), nn.Linear(4, 3)
        self.own_forward, self.tied = Tripled(3, 3), nn.Linear(3, 4, bias=False)
        self.tied.weight = self.first.weight
        self.parametrized = nn.Linear(4, 4)
        parametrize.register_parametrization(self.parametrized, "weight", Doubled())

    def forward(self, x):
        x = self.own_forward(self.frozen(self.first(x).tanh()))
        return self.parametrized(self.tied(x).tanh())


class Linears(TorchFunctionMode):
    """Counts calls of `F.linear`."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is F.linear
        return func(*args, **(kwargs or {}))


def test_derivatives_stay_and_those_of_frozen_weights_go():
    torch.manual_seed(0)
    net = Net().double()
    moved = ["first.weight", "parametrized.parametrizations.weight.original"]
    weights = {n: p.detach() for n, p in net.named_parameters() if n in moved}
    directions = {n: torch.randn_like(w) for n, w in weights.items()}
    x = torch.randn(5, 3, dtype=torch.float64)

    def run(w):
        return functional_call(net, w, (x,))

    expected = jvp(run, (weights,), (directions,))
    parameters = dict(net.named_parameters())
    differentiate_inputs_only(net, {id(parameters[name]) for name in moved})
    with Linears() as linears:
        ours = jvp(run, (weights,), (directions,))
    torch.testing.assert_close(ours, expected)
    assert linears.calls == 6  # the frozen layer's values and tangents apart
    assert {n for n, m in net.named_modules() if "forward" in vars(m)} == {"frozen"}
    torch.testing.assert_close(run(weights), expected[0])
