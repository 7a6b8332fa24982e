"""The paper's functional interface: equal to the classes, and free of bayesian_lora's faults."""

import math

import pytest
import torch
from test_posterior import LENGTHS, loader
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace, LogitsModel
from laplace_lora.functional import (
    calculate_kronecker_factors,
    jacobian_mean,
    model_evidence,
    predict_probs,
    register_hooks,
    remove_hooks,
    save_input_hook,
    save_output_grad_hook,
    variance,
)
from tiny import TARGETS, assert_near, peft_model, token_batch

N_KFAC = 2
DENSE = (None, 512)
LOW = (N_KFAC, 15)
NAMES = ["llama-lm", "bert", "gpt2"]
S2 = torch.tensor(0.7, dtype=torch.float64)


def adapters_only(name, **kwargs):
    """A tiny model whose head is not trained, so that every trainable tensor is an adapter's."""
    return peft_model(name, modules_to_save=None, **kwargs)


def targets(name):
    return TARGETS if name.endswith("-lm") else None


def forward_call(name):
    ids = targets(name)
    return lambda model, batch: LogitsModel(model, target_ids=ids)(batch)


def factors_of(model, name, data=None, n_kfac=None, lr_threshold=512, keywords=("lora",), **kwargs):
    return calculate_kronecker_factors(
        model, forward_call(name), data or loader(), n_kfac, lr_threshold, keywords, **kwargs
    )


def class_of(model, name, n_kfac=None, lr_threshold=512, **kwargs):
    la = KronLoraLaplace(
        model,
        "classification",
        target_ids=targets(name),
        factor_rank=n_kfac,
        low_rank_threshold=lr_threshold - 1,
        residual="zero",
        prior_precision=1 / S2.item(),
        **kwargs,
    )
    la.fit(loader())
    return la


def log_likelihood(model, name, data=None):
    la = LogitsModel(model, target_ids=targets(name)).eval()
    with torch.no_grad():
        return -sum(F.cross_entropy(la(b), b["labels"], reduction="sum") for b in data or loader())


def gaussian(model, name, batch, factors, s2=S2, n_kfac=None, n_lora=2):
    jacobian, f_mu = jacobian_mean(model, batch, targets(name) and torch.tensor(targets(name)))
    f_var = variance(batch, jacobian, factors, s2, f_mu.shape[1], n_lora, n_kfac, "cpu")
    return f_mu, f_var


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


# --- Faults of bayesian_lora 0.0.6 ---------------------------------------------------------------


class Classifier(nn.Module):
    """Logits ``W x`` of one example with one token: here K-FAC is the GGN."""

    def __init__(self, bias=False):
        super().__init__()
        self.lora = nn.Linear(2, 2, bias=bias, dtype=torch.float64)

    def forward(self, batch):
        return self.lora(batch["x"])


def one_example(seed=0):
    torch.manual_seed(seed)
    return {"x": torch.randn(1, 2, dtype=torch.float64), "labels": torch.tensor([1])}


@pytest.mark.parametrize("bias", [False, True])
def test_evidence_is_the_gaussian_integral_of_the_linearised_model(bias):
    """With the curvature's eigenbasis as axes the integral is a product of one-dimensional ones."""
    batch = one_example()
    model = Classifier(bias)
    call = lambda m, b: m(b)  # noqa: E731
    factors = calculate_kronecker_factors(model, call, [batch])
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    names = dict(model.named_parameters())

    def log_joint_parts(vector):
        parts = vector.split([p.numel() for p in model.parameters()])
        weights = {k: v.view_as(p) for (k, p), v in zip(names.items(), parts, strict=True)}
        return functional_call(model, weights, (batch,))[0]

    J = jacrev(log_joint_parts)(theta)
    p = log_joint_parts(theta).softmax(-1)
    ggn = J.T @ (p.diag() - torch.outer(p, p)) @ J
    LL = log_joint_parts(theta).log_softmax(-1)[1].detach()
    values = torch.linalg.eigvalsh(ggn)
    previous = -math.inf
    for s2 in (1e-3, 0.1, 10.0):
        grid = torch.linspace(-12, 12, 20001, dtype=torch.float64) * s2**0.5
        log_integral = sum(
            torch.trapezoid(torch.exp(-0.5 * (e + 1 / s2) * grid**2), grid).log()
            - 0.5 * math.log(2 * math.pi * s2)
            for e in values.clamp(min=0)
        )
        expected = LL - 0.5 * theta.square().sum() / s2 + log_integral
        evidence = model_evidence(model, LL, factors, None, None, s2)
        assert_near(evidence, expected)
        if s2 < 1:
            assert evidence > previous  # a prior far narrower than the weights is bad
        previous = evidence


def test_evidence_peaks_where_the_prior_fits_and_has_gradients():
    model = adapters_only("bert")
    factors = factors_of(model, "bert")
    LL = log_likelihood(model, "bert")
    la = class_of(model, "bert")
    la.optimize_prior_precision()
    best = (1 / la.prior_precision.double()).requires_grad_()
    evidence = model_evidence(model, LL, factors, 2, None, best)
    evidence.backward()
    assert evidence.shape == (1,)
    assert abs(best.grad * best).item() < 1e-6
    for factor in (0.5, 2.0):
        assert model_evidence(model, LL, factors, 2, None, factor * best) < evidence


@pytest.mark.parametrize("s2", [0.0, -1.0, math.nan, math.inf, [0.1, 0.2]])
def test_a_prior_variance_must_be_one_positive_number(s2):
    model = Classifier()
    factors = calculate_kronecker_factors(model, lambda m, b: m(b), [one_example()])
    with pytest.raises(ValueError, match="s2 is the prior variance"):
        model_evidence(model, torch.tensor(0.0), factors, None, None, torch.tensor(s2))
    with pytest.raises(ValueError, match="s2 is the prior variance"):
        variance({}, {}, factors, torch.tensor(s2), 2, None, None, "cpu")


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


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["llama-lm", "gpt2"])
def test_jacobians_equal_jacrev_at_any_batch_size_and_rank(name, batch, rank):
    model = adapters_only(name, r=rank).eval()
    model.set_attn_implementation("eager")
    inputs = token_batch((4,) * batch)
    ids = targets(name)
    jacobian, f_mu = jacobian_mean(model, inputs, ids and torch.tensor(ids))
    weights = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}

    def logits(weights):
        kept = {k: v for k, v in inputs.items() if k != "labels"}
        out = functional_call(model, weights, kwargs=kept).logits
        return out[:, -1][:, ids] if ids else out

    assert_near(f_mu, logits(weights))
    expected = jacrev(logits)(weights)
    assert jacobian.keys() == expected.keys()
    for key, value in expected.items():
        assert_near(jacobian[key], value)
    factors = factors_of(model, name)
    f_var = variance(inputs, jacobian, factors, S2, f_mu.shape[1], rank, None, "cpu")
    assert f_var.shape == (batch, 3, 3)
    assert (torch.linalg.eigvalsh(f_var) > 0).all()


def test_default_outputs_and_callbacks():
    batch = token_batch((4, 2))
    llama = adapters_only("llama-lm")
    jacobian, f_mu = jacobian_mean(llama, batch)
    assert f_mu.shape == (2, 50)
    chosen, some = jacobian_mean(llama, batch, torch.tensor(TARGETS))
    assert_near(some, f_mu[:, TARGETS])
    key = next(iter(jacobian))
    assert_near(chosen[key], jacobian[key][:, TARGETS])
    through, same = jacobian_mean(
        llama, batch, output_callback=lambda out: out.logits[:, [-1, 1]].diagonal()[TARGETS].T
    )
    assert_near(same[0], f_mu[0, TARGETS])
    assert_near(through[key][0], chosen[key][0])
    bert = adapters_only("bert")
    _, both = jacobian_mean(bert, batch, torch.tensor([2, 0]))
    assert_near(both, jacobian_mean(bert, batch)[1][:, [2, 0]])
    t5 = adapters_only("t5-lm")
    _, f_mu = jacobian_mean(t5, batch, torch.tensor(TARGETS), is_s2s=True)
    assert_near(f_mu, LogitsModel(t5, target_ids=TARGETS).eval()(batch).detach())
    with pytest.raises(ValueError, match="is_s2s is False, but the model is an encoder-decoder"):
        jacobian_mean(t5, batch)
    with pytest.raises(ValueError, match="is_s2s is True, but the model is no encoder-decoder"):
        jacobian_mean(bert, batch, is_s2s=True)
    with pytest.raises(ValueError, match="not both"):
        jacobian_mean(llama, batch, torch.tensor(TARGETS), output_callback=lambda out: out.logits)


def test_probabilities_are_averaged_not_logits():
    mean = torch.tensor([[3.0, 0.0]])
    covariance = torch.tensor([[[40.0, 0.0], [0.0, 40.0]]])
    generator = torch.Generator().manual_seed(0)
    probs = predict_probs(mean, covariance, n_samples=20000, generator=generator)
    grid = torch.linspace(-100, 106, 200001, dtype=torch.float64)
    density = torch.distributions.Normal(3.0, math.sqrt(80.0)).log_prob(grid).exp()
    expected = torch.trapezoid(density * grid.sigmoid(), grid).item()
    assert probs.sum().item() == pytest.approx(1)
    assert probs[0, 0].item() == pytest.approx(expected, abs=0.01)
    assert probs[0, 0] < mean.softmax(-1)[0, 0] - 0.2
    probit = predict_probs(mean, covariance, "probit")
    scaled = mean / (1 + math.pi / 8 * 40) ** 0.5
    assert_near(probit, scaled.softmax(-1))
    with pytest.raises(ValueError, match="link_approx must be one of"):
        predict_probs(mean, covariance, "softmax")


class Named(nn.Module):
    """Names of which one is a part of another."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(3, 3)
        self.query = nn.Linear(3, 3)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(12))
        self.lora_A = nn.Linear(3, 3)
        self.explorative = nn.Linear(3, 2)

    def forward(self, x):
        x = self.query(self.q(x))
        for layer in self.layers:
            x = layer(x)
        return self.explorative(self.lora_A(x))


@pytest.mark.parametrize(
    "keywords,names",
    [
        (["q"], ["q"]),
        (["layers.1"], ["layers.1"]),
        (["lora"], ["lora_A"]),
        (["LORA_a", "query"], ["query", "lora_A"]),
        (["lora_A", "explor"], ["lora_A"]),
    ],
)
def test_modules_are_matched_by_whole_parts_of_their_names(keywords, names):
    data = [torch.randn(4, 3)]
    factors = calculate_kronecker_factors(
        Named(), lambda m, x: m(x), data, target_module_keywords=keywords
    )
    assert list(factors) == names


def test_factors_and_jacobians_are_paired_by_whole_names():
    model = Named()
    x = {"x": torch.randn(4, 3)}
    factors = calculate_kronecker_factors(
        model, lambda m, b: m(b["x"]), [x], target_module_keywords=["layers.1", "layers.11"]
    )
    jacobian, _ = jacobian_mean(model, x)
    f_var = variance(x, jacobian, factors, 1.0, 2, None, None, "cpu")
    shuffled = dict(reversed(jacobian.items()))
    assert_near(variance(x, shuffled, factors, 1.0, 2, None, None, "cpu"), f_var)
    prefixed = {f"wrapper.{key}": value for key, value in jacobian.items()}
    assert_near(variance(x, prefixed, factors, 1.0, 2, None, None, "cpu"), f_var)


# --- More than LoRA ------------------------------------------------------------------------------


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
    la = KronLoraLaplace(whole, "classification", factor_rank=None, prior_precision=1 / S2.item())
    la.fit(loader())
    assert_near(f_var, la._glm_predictive_distribution(token_batch((3, 4)))[1])


def test_adapters_of_different_ranks_and_mixed_factors():
    model = adapters_only("bert", rank_pattern={"query": 3, "value": 1})
    la = class_of(model, "bert", *LOW)
    factors = factors_of(model, "bert", n_kfac=LOW[0], lr_threshold=LOW[1])
    batch = token_batch((4, 2))
    for n_lora in (1, 3, None):
        _, f_var = gaussian(model, "bert", batch, factors, n_kfac=N_KFAC, n_lora=n_lora)
        assert_near(f_var, la._glm_predictive_distribution(batch)[1])
    with pytest.raises(ValueError, match="n_lora is 8"):
        gaussian(model, "bert", batch, factors, n_kfac=N_KFAC, n_lora=8)
    with pytest.raises(ValueError, match="n_kfac is 5, but low-rank factors have ranks"):
        gaussian(model, "bert", batch, factors, n_kfac=5)


def test_weights_without_factors_stay_fixed():
    model = peft_model("bert")  # the head is trained too
    factors = factors_of(model, "bert")
    batch = token_batch((4, 2))
    _, f_var = gaussian(model, "bert", batch, factors)
    la = class_of(model, "bert", modules="lora_")
    assert_near(f_var, la._glm_predictive_distribution(batch)[1])


def test_changed_factors_are_decomposed_anew():
    model = adapters_only("bert")
    factors = factors_of(model, "bert")
    batch = token_batch((4, 2))
    wide = 1e8 * S2
    before = gaussian(model, "bert", batch, factors, wide)[1]
    for _, grads in factors.values():
        grads.mul_(100)
    assert gaussian(model, "bert", batch, factors, wide)[1].norm() < 0.9 * before.norm()


# --- Hooks on their own --------------------------------------------------------------------------


def summed_loss(model, batch, column):
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
    (logits * column(logits.detach())).sum().backward()


def hessian_columns(logits):
    from laplace_lora.likelihoods.roots import hessian_root

    return hessian_root(logits, "classification")


@pytest.mark.parametrize("n_kfac,lr_threshold", [DENSE, LOW])
def test_hooks_sum_what_the_function_sums(n_kfac, lr_threshold):
    model = adapters_only("bert").eval()
    expected = factors_of(model, "bert", n_kfac=n_kfac, lr_threshold=lr_threshold)
    activations, output_grads = {}, {}
    data = loader(2, pad_to=9)
    with register_hooks(model, activations, output_grads, ["lora"], n_kfac, lr_threshold):
        for batch in data:
            logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
            columns = hessian_columns(logits.detach())
            for column in columns:
                (logits * column).sum().backward(retain_graph=True)
    model.zero_grad()
    assert activations.keys() == output_grads.keys() == expected.keys()
    for name, (inputs, grads) in expected.items():
        (A, A_low), (S, S_low) = activations[name], output_grads[name]
        assert A_low == (A.shape[0] != A.shape[1]) and S_low == (S.shape[0] != S.shape[1])
        assert_near(S if not S_low else S @ S.T, grads if not S_low else grads @ grads.T)
        mean = inputs if not A_low else inputs @ inputs.T
        assert_near(A if not A_low else A @ A.T, len(LENGTHS) * mean)


def test_hooks_can_be_removed():
    model = adapters_only("bert").eval()
    activations, output_grads = {}, {}
    hooks = register_hooks(model, activations, output_grads, ["lora"], None)
    remove_hooks(hooks)
    assert hooks == []
    with pytest.raises(RuntimeError, match="stop"), register_hooks(model, {}, {}, ["lora"]):
        raise RuntimeError("stop")
    summed_loss(model, token_batch((3,)), lambda f: torch.ones_like(f))
    assert not activations and not output_grads
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_single_hooks_and_positions():
    linear = nn.Linear(4, 3)
    inputs, grads, last, low = {}, {}, {}, {}
    linear.register_forward_pre_hook(save_input_hook("one", inputs, None, 100, has_bias=True))
    linear.register_forward_pre_hook(save_input_hook("one", last, None, 100, positions="last"))
    masks = {"attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]])}
    linear.register_full_backward_hook(save_output_grad_hook("one", grads, None, 9, masks=masks))
    x = torch.randn(2, 3, 4, requires_grad=True)
    linear(x).square().sum().backward()
    ones = torch.cat([x, torch.ones(2, 3, 1)], -1).detach()
    assert_near(inputs["one"][0], torch.einsum("nti,ntj->ij", ones, ones) / 3)
    assert_near(last["one"][0], x[:, -1].T.detach() @ x[:, -1].detach())
    g = 2 * linear(x).detach()[masks["attention_mask"].bool()]
    assert_near(grads["one"][0], g.T @ g)
    hook = save_input_hook("wide", low, 2, 20, svd_dtype=torch.float64)
    hook(linear, (torch.randn(3, 30),))
    assert low["wide"][0].shape == (30, 2) and low["wide"][0].dtype == torch.float64
    assert low["wide"][1] is True and len(low["wide"]) == 2


# --- Bad input -----------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match="at least two logits"):
        calculate_kronecker_factors(model, lambda m, b: m(b)[:, :1], [batch])
    with pytest.raises(ValueError, match=r"expected \(batch, outputs\)"):
        calculate_kronecker_factors(model, lambda m, b: m(b)[0], [batch])
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
