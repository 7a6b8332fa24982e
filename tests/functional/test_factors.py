"""The paper's factors: equal to the class's, over real tokens only, from named modules."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.functional import (
    calculate_kronecker_factors,
    jacobian_mean,
    model_evidence,
    register_hooks,
    variance,
)
from support.batches import LENGTHS, loader, token_batch
from support.functional import (
    DENSE,
    LOW,
    NAMES,
    S2,
    Classifier,
    adapters_only,
    class_of,
    factors_of,
    gaussian,
    log_likelihood,
    one_example,
)
from support.models import peft_model
from support.references import assert_near


@pytest.mark.parametrize("n_kfac,lr_threshold", [DENSE, LOW])
@pytest.mark.parametrize("name", NAMES)
def test_the_functions_equal_the_class(name, n_kfac, lr_threshold):
    model = adapters_only(name)
    la = class_of(model, name, n_kfac, lr_threshold)
    factors = factors_of(model, name, n_kfac=n_kfac, lr_threshold=lr_threshold)
    blocks = [block.name.removeprefix("model.") for block in la.backend.blocks]
    assert [f"{key}.weight" for key in factors] == blocks
    shapes = {tuple(t.shape) for pair in factors.values() for t in pair}
    assert (n_kfac is not None) == any(shape[0] != shape[1] for shape in shapes)
    for (inputs, grads), (grad_cov, input_cov) in zip(
        factors.values(), la.H_facs.kfacs, strict=True
    ):
        for ours, theirs in ((inputs, input_cov), (grads, grad_cov)):
            eigen = theirs.decompose("zero")
            expected = eigen.vectors @ eigen.values.diag() @ eigen.vectors.T
            assert_near(ours if ours.shape == expected.shape else ours @ ours.T, expected)
    LL = log_likelihood(model, name)
    evidence = model_evidence(model, LL, factors, 2, n_kfac, S2)
    assert_near(evidence, la.log_marginal_likelihood())
    batch = token_batch((4, 2, 5), seed=3)
    mean, covariance = la._glm_predictive_distribution(batch)
    f_mu, f_var = gaussian(model, name, batch, factors, n_kfac=n_kfac)
    assert_near(f_mu, mean)
    assert_near(f_var, covariance)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_head_s_factors_equal_the_class_s(name):
    """A decoder's head has inputs at all tokens, of which one counts."""
    model = peft_model(name)
    la = KronLoraLaplace(model, "classification")
    la.fit(loader())
    keywords = ["score" if name == "llama" else "classifier"]
    factors = factors_of(model, name, keywords=keywords, exclude_bias=True)
    (found,) = factors.values()
    head = next(i for i, b in enumerate(la.backend.blocks) if "lora" not in b.name)
    for ours, theirs in zip(found, reversed(la.H_facs.kfacs[head]), strict=True):
        d = len(ours)  # without the column of a bias
        assert_near(ours, theirs.matrix[:d, :d])


@pytest.mark.slow
def test_the_monte_carlo_fisher_tends_to_the_exact_one():
    model = adapters_only("bert")
    exact = factors_of(model, "bert")
    torch.manual_seed(0)
    sampled = factors_of(model, "bert", num_samples=4000)
    name = next(iter(exact))
    assert_near(sampled[name][0], exact[name][0])
    assert 1e-4 < (sampled[name][1] - exact[name][1]).norm() / exact[name][1].norm() < 0.1


def test_a_whole_vocabulary_is_estimated_with_a_warning(monkeypatch):
    monkeypatch.setattr("laplace_lora.functional.factors.EXACT_UP_TO", 10)

    def vocabulary(model, batch):
        return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -1]

    with pytest.warns(UserWarning, match="Monte-Carlo"):
        factors = calculate_kronecker_factors(
            adapters_only("llama-lm"), vocabulary, loader(7), target_module_keywords=["lora"]
        )
    assert all(t.isfinite().all() for pair in factors.values() for t in pair)


def test_curvature_does_not_depend_on_batches_or_a_partial_last_one():
    model = adapters_only("llama-lm")
    whole = factors_of(model, "llama-lm", loader(len(LENGTHS)))
    for batch_size in (1, 2, 3):
        parts = factors_of(model, "llama-lm", loader(batch_size))
        for name, pair in whole.items():
            assert_near(list(parts[name]), list(pair))


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_real_token_counts_and_no_padding_does(side):
    model = adapters_only("llama-lm")
    reference = factors_of(model, "llama-lm")
    padded = factors_of(model, "llama-lm", loader(7, pad_to=11, side=side))
    last = factors_of(model, "llama-lm", positions="last")
    for name, pair in reference.items():
        assert_near(list(padded[name]), list(pair))
        assert (last[name][0] - pair[0]).norm() > 0.01 * pair[0].norm()


def test_the_last_position_is_the_last_real_token():
    model = adapters_only("llama-lm")
    reference = factors_of(model, "llama-lm", loader(1), positions="last")
    for side in ("left", "right"):
        padded = factors_of(model, "llama-lm", loader(7, pad_to=11, side=side), positions="last")
        for name, pair in reference.items():
            assert_near(list(padded[name]), list(pair))
    one = token_batch((5,))
    data = DataLoader([{key: value[0] for key, value in one.items()}])
    seen = {}
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    factor = factors_of(model, "llama-lm", data, positions="last")[name][0]
    handle.remove()
    x = seen["x"][0, -1].detach()
    assert_near(factor, torch.outer(x, x))


def test_masks_come_from_a_reader_the_batch_or_the_call():
    """The third is for scripts that tokenise inside `forward_call`."""
    model = adapters_only("bert")
    reference = factors_of(model, "bert")
    batches = list(loader(7, pad_to=11))

    def hidden(model, batch):  # the batch says nothing about its padding
        return model(**{k: v for k, v in batch[0].items() if k != "labels"}).logits

    pairs = [(batch,) for batch in batches]
    read = calculate_kronecker_factors(
        model,
        hidden,
        pairs,
        target_module_keywords=["lora"],
        attention_mask=lambda batch: batch[0]["attention_mask"],
    )
    called = calculate_kronecker_factors(model, hidden, pairs, target_module_keywords=["lora"])
    wrong = calculate_kronecker_factors(
        model,
        hidden,
        pairs,
        target_module_keywords=["lora"],
        attention_mask=lambda batch: torch.ones_like(batch[0]["attention_mask"]),
    )
    name = next(iter(reference))
    for factors in (read, called):
        assert_near(list(factors[name]), list(reference[name]))
    assert (wrong[name][0] - reference[name][0]).norm() > 0.01 * reference[name][0].norm()


def test_dropout_is_off_and_the_model_comes_back_as_it_was():
    model = adapters_only("bert").train()
    modes = [module.training for module in model.modules()]
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    required = [parameter.requires_grad for parameter in model.parameters()]
    first, second = (factors_of(model, "bert", keywords=[""]) for _ in range(2))
    jacobian, _ = jacobian_mean(model, token_batch((3, 2)))
    again, _ = jacobian_mean(model, token_batch((3, 2)))
    for name, pair in first.items():
        assert torch.equal(pair[0], second[name][0]) and torch.equal(pair[1], second[name][1])
    assert all(torch.equal(jacobian[key], again[key]) for key in jacobian)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == required
    assert all(bool((parameter.grad == 1).all()) for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_biases_are_exact_and_can_be_left_out():
    """One example with one token: the block of weight and bias together is the GGN."""
    batch = one_example()
    model = Classifier(bias=True)
    call = lambda m, b: m(b)  # noqa: E731
    factors = calculate_kronecker_factors(model, call, [batch])
    inputs, grads = factors["lora"]
    x = torch.cat([batch["x"][0], torch.ones(1, dtype=torch.float64)])
    p = model(batch)[0].softmax(-1).detach()
    hessian = p.diag() - torch.outer(p, p)
    assert_near(inputs, torch.outer(x, x))
    assert_near(grads, hessian)
    jacobian, _ = jacobian_mean(model, {"batch": batch})
    f_var = variance(batch, jacobian, factors, S2, 2, None, None, "cpu")
    J = torch.kron(torch.eye(2, dtype=torch.float64), x.unsqueeze(0))
    precision = torch.kron(hessian, torch.outer(x, x)) + torch.eye(6, dtype=torch.float64) / S2
    assert_near(f_var[0], J @ torch.linalg.inv(precision) @ J.T)
    weight_only = calculate_kronecker_factors(model, call, [batch], exclude_bias=True)
    assert weight_only["lora"][0].shape == (2, 2)
    fixed = variance(batch, jacobian, weight_only, S2, 2, None, None, "cpu")
    assert (f_var - fixed).diagonal(dim1=1, dim2=2).min() > 0.1


def test_conv1d_frozen_layers_and_idle_ones():
    model = peft_model("gpt2")
    factors = factors_of(model, "gpt2", keywords=[""])
    names = list(factors)
    assert any(name.endswith("c_attn.base_layer") for name in names)
    assert not any("original_module" in name for name in names)
    conv = next(name for name in names if name.endswith("h.0.mlp.c_fc"))
    assert factors[conv][0].shape == (17, 17) and factors[conv][1].shape == (64, 64)
    whole = model.get_base_model().double()
    for name, parameter in whole.named_parameters():
        parameter.requires_grad_(name.endswith("mlp.c_proj.weight"))
    square = nn.Linear(16, 16)  # a square Conv1D weight must not be taken for its transpose
    assert square.weight.shape == (16, 16)
    jacobian, _ = jacobian_mean(whole, token_batch((3, 4)))
    some = calculate_kronecker_factors(
        whole,
        lambda m, b: LogitsModel(m)(b),
        loader(),
        target_module_keywords=["mlp.c_proj"],
        exclude_bias=True,
    )
    f_var = variance(token_batch((3, 4)), jacobian, some, S2, 3, None, None, "cpu")
    with pytest.warns(UserWarning, match="the adapter is frozen"):
        la = KronLoraLaplace(
            whole, "classification", factor_rank=None, prior_precision=1 / S2.item()
        )
    la.fit(loader())
    assert_near(f_var, la._glm_predictive_distribution(token_batch((3, 4)))[1])


def test_probabilities_are_refused():
    with pytest.raises(ValueError, match="forward_call returned probabilities"):
        calculate_kronecker_factors(Classifier(), lambda m, b: m(b).softmax(-1), [one_example()])


def test_bad_arguments_are_refused():
    model, batch = Classifier(), one_example()
    call = lambda m, b: m(b)  # noqa: E731
    with pytest.raises(ValueError, match="the loader is empty"):
        calculate_kronecker_factors(model, call, [])
    with pytest.raises(ValueError, match="select no linear module"):
        calculate_kronecker_factors(model, call, [batch], target_module_keywords=["lo"])
    with pytest.raises(TypeError, match="give a list of keywords"):
        calculate_kronecker_factors(model, call, [batch], target_module_keywords="lora")
    with pytest.raises(ValueError, match="positions must be one of"):
        calculate_kronecker_factors(model, call, [batch], positions="first")
    for samples in (0, -1):
        with pytest.raises(ValueError, match="num_samples must be at least 1"):
            calculate_kronecker_factors(model, call, [batch], num_samples=samples)
    with pytest.raises(ValueError, match="at least two logits"):
        calculate_kronecker_factors(model, lambda m, b: m(b)[:, :1], [batch])
    with pytest.raises(ValueError, match=r"expected \(batch, outputs\)"):
        calculate_kronecker_factors(model, lambda m, b: m(b)[0], [batch])
    with pytest.raises(TypeError, match=r"must return the logits, .* got dict; .*`\.logits`"):
        calculate_kronecker_factors(model, lambda m, b: {"logits": m(b)}, [batch])
    with pytest.raises(RuntimeError, match="carry no gradient"):
        calculate_kronecker_factors(model, lambda m, b: m(b).detach(), [batch])
    bad = {**batch, "x": batch["x"] * math.nan}
    with pytest.raises(FloatingPointError, match=r"batch 1: .*lora"):
        calculate_kronecker_factors(model, call, [batch, bad])
    with pytest.raises(ValueError, match="already hold 'lora'"):
        register_hooks(model, {"lora": None}, {}, [""])
    factors = calculate_kronecker_factors(model, call, [batch])
    LL = torch.tensor(-1.0)
    with pytest.raises(ValueError, match="no module 'other'"):
        model_evidence(model, LL, {"other": factors["lora"]}, None, None, 1.0)
    with pytest.raises(ValueError, match="there are no factors"):
        model_evidence(model, LL, {}, None, None, 1.0)
    with pytest.raises(ValueError, match="the factors of 'lora' have sides"):
        model_evidence(model, LL, {"lora": (torch.eye(3), torch.eye(4))}, None, None, 1.0)
    jacobian, _ = jacobian_mean(model, {"batch": batch})
    with pytest.raises(ValueError, match="no tensors of that name"):
        variance(batch, {}, factors, 1.0, 2, None, None, "cpu")
    with pytest.raises(ValueError, match="3 logits and its factors need"):
        variance(batch, jacobian, factors, 1.0, 3, None, None, "cpu")
    with pytest.raises(ValueError, match="5 examples"):
        variance({"x": torch.zeros(5, 2)}, jacobian, factors, 1.0, 2, None, None, "cpu")
