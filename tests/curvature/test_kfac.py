"""K-FAC: exact where theory says exact, and blind to padding and batching."""

import pytest
import torch
from torch import nn

from laplace_lora import LoraGGN, LowRankKron
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import rows, token_batch
from support.models import ARCHITECTURES, logits_model
from support.references import assert_near, block_diagonal_part, explicit_ggn

LENGTHS = (3, 6, 4, 6, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_kfac_is_exact_for_one_example_of_one_token(name, approximation):
    model, batch = logits_model(name), token_batch((1,))
    if (
        name == "t5-lm"
    ):  # the end of its cross attention sees one encoder token and one decoder step
        assert batch["input_ids"].shape == (1, 1)
    _, kron = LoraGGN(model, "classification", kfac_approx=approximation).kron(
        batch, batch["labels"], N=1
    )
    exact = block_diagonal_part(explicit_ggn(model, batch), model)
    assert_near(kron.to_matrix(), exact)


def test_kfac_is_exact_for_deep_linear_nets_with_squared_loss():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 2)).double()
    X, y = torch.randn(11, 4).double(), torch.randn(11, 2).double()
    backend = LoraGGN(net, "regression")
    exact = block_diagonal_part(backend.full(X, y)[1], net)
    assert_near(backend.kron(X, y, N=11)[1].to_matrix(), exact)


def test_reduce_is_exact_where_a_linear_net_averages_its_tokens():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6, bias=False), nn.Linear(6, 2, bias=False)

        def forward(self, x):
            return self.second(self.first(x)).mean(1)

    torch.manual_seed(0)
    net = Averaging().double()
    X, y = torch.randn(7, 3, 4).double(), torch.randn(7, 2).double()
    backend = LoraGGN(net, "regression", kfac_approx="reduce")
    exact = block_diagonal_part(backend.full(X, y)[1], net)
    assert_near(backend.kron(X, y, N=7)[1].to_matrix(), exact)
    expand = LoraGGN(net, "regression").kron(X, y, N=7)[1].to_matrix()
    assert not torch.allclose(expand, exact, rtol=1e-2)


def test_kfac_is_not_the_ggn_in_general():
    """A known limit: the factors drop correlations between tokens and examples."""
    model, batch = logits_model("llama-lm"), token_batch(LENGTHS)
    _, kron = LoraGGN(model, "classification").kron(batch, batch["labels"], N=len(LENGTHS))
    exact = block_diagonal_part(explicit_ggn(model, batch), model)
    assert (kron.to_matrix() - exact).norm() > 0.05 * exact.norm()


def test_factors_equal_a_plain_loop_over_real_tokens():
    model, batch = logits_model("llama-lm"), token_batch(LENGTHS, pad_to=9)
    backend = LoraGGN(model, "classification")
    _, kron = backend.kron(batch, batch["labels"], N=len(LENGTHS))
    name = backend.maps[0].name
    captured = {}
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, a, out: captured.update(a=a[0], g=out))
    input_cov, grad_cov = 0, 0
    for n, length in enumerate(LENGTHS):
        f = model(rows(batch, slice(n, n + 1)))
        a = captured["a"][0, :length].detach()
        input_cov = input_cov + a.T @ a / length / len(LENGTHS)
        for column in softmax_root(f.detach()):
            (g,) = torch.autograd.grad(f, captured["g"], column, retain_graph=True)
            grad_cov = grad_cov + g[0, :length].T @ g[0, :length]
    handle.remove()
    assert_near(kron.kfacs[0], [grad_cov, input_cov])


def summed_kron(model, batch, sizes, **kwargs):
    backend = LoraGGN(model, "classification", **kwargs)
    total, at = None, 0
    for size in sizes:
        part = rows(batch, slice(at, at + size))
        _, kron = backend.kron(part, part["labels"], N=len(batch["labels"]))
        total = kron if total is None else total + kron
        at += size
    return total


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_do_not_depend_on_batching_or_padding(name, approximation):
    model = logits_model(name)
    sides = ["right", "left"] if name not in ("bert", "roberta", "gpt2", "t5-lm") else ["right"]
    reference = summed_kron(model, token_batch(LENGTHS), (5,), kfac_approx=approximation)
    for side in sides:
        for width in (6, 13):
            for sizes in ((5,), (1,) * 5, (3, 2)):
                batch = token_batch(LENGTHS, pad_to=width, side=side)
                kron = summed_kron(model, batch, sizes, kfac_approx=approximation)
                assert_near(kron.kfacs, reference.kfacs)


def test_padding_without_a_mask_would_change_the_factors():
    """What the mask is for: without it pad columns would count as tokens, so it is asked for."""
    model, batch = logits_model("llama"), token_batch(LENGTHS, pad_to=13)
    masked = summed_kron(model, batch, (5,))
    ones = torch.ones_like(batch["input_ids"])
    all_real = summed_kron(model, {**batch, "attention_mask": ones}, (5,))
    difference = (masked.diag() - all_real.diag()).norm() / masked.diag().norm()
    assert difference > 0.1
    unmasked = {k: v for k, v in batch.items() if k != "attention_mask"}
    with pytest.raises(ValueError, match=r"padding token \(0\).*Kronecker factors would count it"):
        summed_kron(model, unmasked, (5,))


def test_sketches_do_not_depend_on_batching_or_padding():
    model = logits_model("llama-lm")
    kwargs = {"factor_rank": 2, "low_rank_threshold": 4}
    reference = summed_kron(model, token_batch(LENGTHS), (5,), **kwargs)
    assert isinstance(reference, LowRankKron)
    batch = token_batch(LENGTHS, pad_to=11, side="left")
    kron = summed_kron(model, batch, (2, 2, 1), **kwargs)
    for x, y in zip(kron.factors(), reference.factors(), strict=True):
        for name in ("sketch", "matrix", "trace"):
            if hasattr(x, name):
                assert_near(getattr(x, name), getattr(y, name))


def test_a_factor_rank_that_suffices_equals_dense():
    model, batch = logits_model("llama-lm", r=1), token_batch((2,))
    dense = LoraGGN(model, "classification").kron(batch, batch["labels"], N=1)[1]
    low = LoraGGN(model, "classification", factor_rank=2, low_rank_threshold=4).kron(
        batch, batch["labels"], N=1
    )[1]
    assert any(hasattr(factor, "sketch") for factor in low.factors())
    # Two tokens: input covariances of rank two; one column a class and token at most for gradients.
    input_side = low.decompose().blocks[0][1]
    exact = dense.kfacs[0][1]
    rebuilt = input_side.vectors @ input_side.values.diag() @ input_side.vectors.T
    assert_near(rebuilt, exact)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_projections_of_one_input_share_its_covariance(name):
    model, batch = logits_model(name), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification", factor_rank=2, low_rank_threshold=64)
    _, kron = backend.kron(batch, batch["labels"], N=5)
    named = {block.name: kron.kfacs[i] for i, block in enumerate(backend.blocks)}
    q = [F[1] for key, F in named.items() if "layers.0" in key and "q_proj.lora_A" in key]
    v = [F[1] for key, F in named.items() if "layers.0" in key and "v_proj.lora_A" in key]
    assert len(kron.factors()) == 2 * len(backend.maps) - (2 if name == "llama" else 0)
    if name == "llama":
        assert q[0] is v[0]
