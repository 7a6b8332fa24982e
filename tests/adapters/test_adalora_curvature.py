"""AdaLoRA's three tensors in the curvature backend, against explicit loops and `jacrev`."""

import pytest
import torch

from laplace_lora import DiagLoraLaplace, KronLoraLaplace, LogitsModel, LoraGGN
from laplace_lora.capture.recorder import record
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import LENGTHS, loader, rows, token_batch
from support.models import TARGETS, adalora_model
from support.references import assert_near, explicit_jacobians

NAMES = ["llama-lm", "bert", "gpt2"]


def wrapped(name, **kwargs):
    return LogitsModel(
        adalora_model(name, **kwargs), target_ids=TARGETS if name.endswith("-lm") else None
    ).eval()


@pytest.mark.parametrize("name", NAMES)
def test_jacobians_equal_jacrev(name):
    model = wrapped(name)
    backend = LoraGGN(model, "classification")
    names = [block.name for block in backend.blocks]
    assert {part for n in names for part in ("lora_A", "lora_E", "lora_B") if part in n} == {
        "lora_A",
        "lora_E",
        "lora_B",
    }
    batch = token_batch((4, 2, 5))
    _, blocks = backend.engine.jacobian_blocks(batch)
    assert_near(list(blocks), explicit_jacobians(model, batch))


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_equal_an_explicit_loop(approximation):
    """``lora_A`` and ``lora_B`` have Kronecker factors; the block of ``lora_E`` is exact."""
    model = wrapped("llama-lm")
    backend = LoraGGN(model, "classification", kfac_approx=approximation)
    batch = token_batch(LENGTHS)
    _, kron = backend.kron(batch, batch["labels"], N=len(LENGTHS))
    by_name = dict(zip([block.name for block in backend.blocks], kron.kfacs, strict=True))
    name, layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "lora_E"))
    A, E, B = (getattr(layer, f"lora_{part}")["default"].detach() for part in "AEB")
    scale = layer.scaling["default"] / (layer.ranknum["default"].detach() + 1e-5)
    sums = {"A": [0, 0], "E": [0], "B": [0, 0]}
    for n in range(len(LENGTHS)):
        one = rows(batch, [n])
        x = {}
        handle = layer.register_forward_hook(lambda m, args, out, x=x: x.update(x=args[0], y=out))
        f = model(one)
        handle.remove()
        real = one["attention_mask"][0].bool()
        a = x["x"][0, real].detach()
        for column in softmax_root(f.detach()):
            g = torch.autograd.grad(f, x["y"], column, retain_graph=True)[0][0, real] * scale
            inner = g @ B
            outer = ((a @ A.T) * inner).sum(0)
            sums["E"][0] += torch.outer(outer, outer)
            for role, grad in (("A", inner * E.T), ("B", g)):
                grad = grad.sum(0, keepdim=True) if approximation == "reduce" else grad
                sums[role][0] += grad.T @ grad
        for role, inputs in (("A", a), ("B", (a @ A.T) * E.T)):
            if approximation == "reduce":
                inputs = inputs.mean(0, keepdim=True)
            sums[role][1] += inputs.T @ inputs / len(inputs) / len(LENGTHS)
    for role, expected in sums.items():
        assert_near(by_name[f"{name}.lora_{role}.default"], expected)


def test_kfac_is_the_ggn_of_one_example_with_one_token():
    model = wrapped("bert", modules_to_save=None)
    batch = token_batch((1,))
    backend = LoraGGN(model, "classification")
    _, kron = backend.kron(batch, batch["labels"], N=1)
    roots = softmax_root(model(batch).detach())[:, 0]
    jacobians = explicit_jacobians(model, batch)
    for factors, jacobian in zip(kron.kfacs, jacobians, strict=True):
        J = roots @ jacobian[0].flatten(1)
        block = factors[0] if len(factors) == 1 else torch.kron(*factors)
        assert_near(block, J.T @ J)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
def test_posteriors_fit_and_predict_on_adalora(cls):
    model = adalora_model("bert")
    kwargs = {"factor_rank": None} if cls is KronLoraLaplace else {}
    la = cls(model, "classification", **kwargs)
    la.fit(loader())
    batch = token_batch((4, 2))
    jacobians = torch.cat([j.flatten(2) for j in explicit_jacobians(la.model, batch)], -1)
    mean, covariance = la._glm_predictive_distribution(batch)
    assert_near(covariance, la.functional_variance(jacobians))
    assert_near(mean, la.model(batch).detach())
    if cls is DiagLoraLaplace:
        train = next(iter(loader(len(LENGTHS))))
        roots = softmax_root(la.model(train).detach())
        J = torch.cat([j.flatten(2) for j in explicit_jacobians(la.model, train)], -1)
        assert_near(la.H, torch.einsum("knc,ncp->knp", roots, J).square().sum((0, 1)))
    la.optimize_prior_precision()
    assert la.log_marginal_likelihood().isfinite()


def test_padding_does_not_count():
    la = KronLoraLaplace(adalora_model("bert"), "classification")
    la.fit(loader())
    reference = la.log_marginal_likelihood()
    la.fit(loader(7, pad_to=11))
    assert_near(la.log_marginal_likelihood(), reference)


def test_projections_with_one_input_share_its_covariance():
    model = wrapped("bert", dtype=torch.float32).to(torch.bfloat16)
    for name, parameter in model.named_parameters():  # PEFT keeps adapters in float32
        if "lora_" in name:
            parameter.data = parameter.data.float()
    backend = LoraGGN(model, "classification")
    tape = record(model, backend.maps, token_batch((3, 3)))
    roles = [linear.name + getattr(linear, "role", "") for linear in tape.maps]
    query, value = (
        next(i for i, role in enumerate(roles) if f"{part}A" in role) for part in ("query", "value")
    )
    assert tape.input_groups[query] == tape.input_groups[value]


def test_rank_counts_are_never_trained():
    model = adalora_model("bert")
    for name, parameter in model.named_parameters():
        if "ranknum" in name:  # as PEFT does with half-precision models
            parameter.requires_grad_(True)
    names = [block.name for block in LoraGGN(LogitsModel(model), "classification").blocks]
    assert not any("ranknum" in name for name in names)


def test_deberta_is_detected_by_the_curvature():
    """It calls its query and key projections on content and, without a batch, on positions."""
    model = adalora_model("deberta")
    with pytest.raises(RuntimeError, match=r"(query|key)_proj' ran [23] times"):
        KronLoraLaplace(model, "classification").fit(loader())
