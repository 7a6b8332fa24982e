"""The curvature backends: exact where theory says exact, and blind to padding and batching."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from laplace_lora import LogitsModel, LoraEF, LoraGGN, LowRankKron
from laplace_lora.adapters.discovery import trainable_maps
from laplace_lora.capture.recorder import record
from laplace_lora.likelihoods.roots import hessian_root
from tiny import ARCHITECTURES, PAD, TARGETS, assert_near, excite, peft_model, rows, token_batch

LENGTHS = (3, 6, 4, 6, 1)


def logits_model(name, **kwargs):
    targets = TARGETS if name.endswith("-lm") else None
    return LogitsModel(peft_model(name, **kwargs), target_ids=targets).eval()


def explicit_jacobians(model, batch):
    """One autograd call an example and output: the reference."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    result = []
    for n in range(len(batch["labels"])):
        f = model(rows(batch, slice(n, n + 1)))[0]
        grads = [
            torch.autograd.grad(out, parameters, retain_graph=True, allow_unused=True) for out in f
        ]
        zero = [torch.zeros_like(p) for p in parameters]
        result.append(
            torch.stack(
                [
                    torch.cat(
                        [(z if g is None else g).flatten() for g, z in zip(grad, zero, strict=True)]
                    )
                    for grad in grads
                ]
            )
        )
    return torch.stack(result)


def explicit_ggn(model, batch):
    J = explicit_jacobians(model, batch)
    p = model(batch).softmax(-1)
    Lambda = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ncp,nck,nkq->pq", J, Lambda, J)


def block_diagonal_part(matrix, model):
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    parts, at = [], 0
    for size in sizes:
        parts.append(matrix[at : at + size, at : at + size])
        at += size
    return torch.block_diag(*parts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_jacobians_equal_an_explicit_loop(name):
    model, batch = logits_model(name), token_batch(LENGTHS)
    jacobians, f = LoraGGN(model, "classification").jacobians(batch)
    assert_near(f, model(batch).detach())
    assert_near(jacobians, explicit_jacobians(model, batch))


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2-lm", "t5-lm"])
def test_full_and_diagonal_equal_the_explicit_ggn(name):
    model, batch = logits_model(name), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification")
    exact = explicit_ggn(model, batch)
    loss, full = backend.full(batch, batch["labels"])
    assert_near(full, exact)
    assert_near(backend.diag(batch, batch["labels"])[1], exact.diagonal())
    expected = nn.functional.cross_entropy(model(batch), batch["labels"], reduction="sum")
    assert_near(loss, expected.detach())


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
        for column in hessian_root(f.detach(), "classification"):
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
    """What the mask is for: without it pad columns count as tokens."""
    model, batch = logits_model("llama"), token_batch(LENGTHS, pad_to=13)
    masked = summed_kron(model, batch, (5,))
    unmasked = summed_kron(model, {k: v for k, v in batch.items() if k != "attention_mask"}, (5,))
    difference = (masked.diag() - unmasked.diag()).norm() / masked.diag().norm()
    assert difference > 0.1


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


def test_monte_carlo_fisher_is_unbiased_and_its_samples_count():
    model, batch = logits_model("bert"), token_batch((4, 4))
    y = batch["labels"]
    exact = LoraGGN(model, "classification").diag(batch, y)[1]
    torch.manual_seed(0)
    errors = []
    for samples in (1, 400):
        backend = LoraGGN(model, "classification", stochastic=True, num_samples=samples)
        errors.append((backend.diag(batch, y)[1] - exact).norm() / exact.norm())
    assert errors[1] < 0.15 < errors[0]


def test_empirical_fisher_uses_the_labels():
    model, batch = logits_model("bert"), token_batch((4, 4))
    y = batch["labels"]
    gradients, _ = LoraEF(model, "classification").gradients(batch, y)
    _, full = LoraEF(model, "classification").full(batch, y)
    assert_near(full, gradients.T @ gradients)
    assert_near(LoraEF(model, "classification").diag(batch, y)[1], full.diagonal())
    other = LoraEF(model, "classification").diag(batch, (y + 1) % 3)[1]
    assert not torch.allclose(full.diagonal(), other)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"modules_to_save": ["classifier"], "target_modules": ["query"]},
        {"target_modules": "all-linear", "modules_to_save": None},
        {"bias": "lora_only"},
    ],
)
def test_adapter_kinds_equal_the_explicit_ggn(kwargs):
    model, batch = logits_model("bert", **kwargs), token_batch(LENGTHS)
    backend = LoraGGN(model, "classification")
    assert_near(backend.full(batch, batch["labels"])[1], explicit_ggn(model, batch))
    one = token_batch((1,))
    exact = block_diagonal_part(explicit_ggn(model, one), model)
    assert_near(backend.kron(one, one["labels"], N=1)[1].to_matrix(), exact)


def test_trained_conv1d_is_covered_as_it_is_stored():
    model = peft_model("gpt2", target_modules=["c_proj"], modules_to_save=["c_attn", "score"])
    model = LogitsModel(excite(model)).eval()
    backend = LoraGGN(model, "classification")
    assert any(linear.transposed for linear in backend.maps)
    one = token_batch((1,))
    exact = block_diagonal_part(explicit_ggn(model, one), model)
    assert_near(backend.kron(one, one["labels"], N=1)[1].to_matrix(), exact)


def test_subnetworks_select_from_full_diagonal_and_jacobians():
    model, batch = logits_model("bert"), token_batch((4, 4))
    indices = torch.tensor([3, 0, 17])
    whole = LoraGGN(model, "classification")
    part = LoraGGN(model, "classification", subnetwork_indices=indices)
    y = batch["labels"]
    full = whole.full(batch, y)[1]
    assert_near(part.full(batch, y)[1], full[indices][:, indices])
    assert_near(part.diag(batch, y)[1], full.diagonal()[indices])
    assert_near(part.jacobians(batch)[0], whole.jacobians(batch)[0][..., indices])
    with pytest.raises(ValueError, match="cannot cover a subnetwork"):
        part.kron(batch, y, N=2)


def test_a_map_without_influence_has_no_curvature():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            self.idle(x)
            return self.used(x)

    net, X = Idle(), torch.randn(3, 4)
    backend = LoraGGN(net, "regression")
    _, full = backend.full(X, torch.zeros(3, 2))
    assert full[:10, :10].any()
    assert not full[10:].any()
    assert not backend.kron(X, torch.zeros(3, 2), N=3)[1].to_matrix()[10:].any()


def test_plain_peft_models_need_no_transformer():
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    config = LoraConfig(r=2, target_modules=["0", "2"])
    model = LogitsModel(excite(get_peft_model(net, config)).double()).eval()
    X = torch.randn(5, 6).double()
    ours, _ = LoraGGN(model, "classification").jacobians(X)
    theirs, _ = super(LoraGGN.__mro__[1], LoraGGN(model, "classification")).jacobians(X)
    assert_near(ours, theirs)


def test_pad_is_a_token_nothing_else_uses():
    assert not (token_batch(LENGTHS)["input_ids"][1] == PAD).any()
