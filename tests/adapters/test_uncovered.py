"""``uncovered="diag"``: exact diagonal blocks where no Kronecker factor fits."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from laplace_lora import KronLoraLaplace, LoraGGN
from laplace_lora.adapters.diagonal_maps import ElementwiseMap, WholeTensor
from laplace_lora.likelihoods.roots import softmax_root
from laplace_lora.linalg.factors import DiagonalFactor
from support.batches import token_batch
from support.models import excite
from support.references import assert_near, explicit_jacobians
from support.uncovered import UNCOVERED, uncovered_model

BATCH = token_batch((4, 2, 5))


@pytest.mark.parametrize("key", UNCOVERED)
def test_jacobians_and_blocks_are_exact(key):
    model = uncovered_model(key)
    backend = LoraGGN(model, "classification", factor_rank=8, uncovered="diag")
    f, blocks = backend.engine.jacobian_blocks(BATCH)
    expected = explicit_jacobians(model, BATCH)
    assert_near(list(blocks), expected)
    _, kron = backend.kron(BATCH, BATCH["labels"], N=3)
    roots = softmax_root(f)
    diagonal = 0
    for block, factors, J in zip(backend.blocks, kron.kfacs, expected, strict=True):
        if isinstance(factors[0], DiagonalFactor):
            diagonal += 1
            rows = torch.einsum("knc,ncp->knp", roots, J.flatten(2))
            assert_near(factors[0].sums, rows.square().sum((0, 1)))
        else:
            assert "lora" in block.name or "modules_to_save" in block.name
    assert diagonal > 3


def test_norms_and_magnitudes_take_the_fast_way():
    kinds = {}
    for key in ("norms of bert", "norms of gpt2", "dora", "norms and relative biases of t5"):
        backend = LoraGGN(uncovered_model(key), "classification", uncovered="diag")
        backend.jacobians(BATCH)
        for block in backend.blocks:
            kinds.setdefault(type(backend.maps[block.map]), []).append(block.name)
    fast, slow = kinds[ElementwiseMap], kinds[WholeTensor]
    assert all("norm" in n.lower() or "ln_" in n or "magnitude" in n for n in fast)
    assert slow and all("position_emb" in n or "relative_attention_bias" in n for n in slow)


class Norms(nn.Module):
    """Norms of several kinds, one of which normalises another dimension than it seems to."""

    class ChannelsRMSNorm(nn.Module):
        def __init__(self, d):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(d))

        def forward(self, x):
            return x * self.weight.unsqueeze(-1)  # of the tokens, which are as many

    class SquaredRMSNorm(ChannelsRMSNorm):
        def forward(self, x):
            return x * self.weight.square()

    def __init__(self):
        super().__init__()
        self.gemma, self.torch = GemmaRMSNorm(4), nn.RMSNorm(4)
        self.channels, self.squared = self.ChannelsRMSNorm(4), self.SquaredRMSNorm(4)
        self.layer = nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        x = self.gemma(torch.tanh(self.torch(x)))
        x = torch.tanh(self.squared(self.channels(x)))
        x = self.layer(torch.tanh(x)) + self.layer(x).square()  # one norm, called twice
        return self.scale * self.head(x).mean(1)


def test_what_only_looks_like_a_norm_takes_the_slow_way():
    torch.manual_seed(0)
    net = excite(Norms()).double().eval()
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    backend = LoraGGN(net, "classification", uncovered="diag")
    jacobians, _ = backend.jacobians(x)
    expected = explicit_jacobians(net, x)
    assert_near(jacobians, torch.cat([j.reshape(5, 3, -1) for j in expected], -1))
    slow = {b.name for b in backend.blocks if isinstance(backend.maps[b.map], WholeTensor)}
    assert slow == {"scale", "channels.weight", "squared.weight"}


def test_tied_and_grouped_weights_have_a_diagonal():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.conv = nn.Conv1d(4, 4, 3, groups=2)
            self.grouped = nn.Conv2d(1, 3, 2)

        def forward(self, x):
            x = torch.tanh(self.conv(torch.tanh(self.second(torch.tanh(self.first(x))))))
            return self.grouped(x.unsqueeze(1)).mean((2, 3))

    torch.manual_seed(0)
    net = Tied().double().eval()
    x = torch.randn(5, 4, 4, dtype=torch.float64)
    jacobians, _ = LoraGGN(net, "classification", uncovered="diag").jacobians(x)
    expected = explicit_jacobians(net, x)
    assert_near(jacobians, torch.cat([j.flatten(2) for j in expected], -1))


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="uncovered must be one of"):
        KronLoraLaplace(uncovered_model("dora"), "classification", uncovered="diagonal")
