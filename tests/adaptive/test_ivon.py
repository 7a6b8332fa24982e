"""IVON: its fixed points, its posterior, and that it leaves the model as it should."""

import copy
import math
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from laplace_lora import DiagLoraLaplace
from laplace_lora.adaptive import IVON
from support.batches import loader, split_rows, token_batch
from support.models import adalora_model, peft_model
from support.references import assert_near

STATE = ("momentum", "hessian")


def regression(n=60, d=3, noise=0.7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    X = torch.linalg.qr(X)[0] * torch.tensor([3.0, 6.0, 9.0])  # a diagonal XᵀX: mean field is exact
    y = X @ torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)
    return X, y + noise * torch.randn(n, generator=generator, dtype=torch.float64)


def test_drawn_weights_are_no_mean():
    w = nn.Parameter(torch.zeros(3))
    optimizer = IVON([w], ess=10)
    with (
        optimizer.sampled_params(),
        pytest.raises(RuntimeError, match=r"restore\(\) the mean first"),
    ):
        optimizer.marginals()
    with (
        optimizer.sampled_params(),
        pytest.raises(RuntimeError, match="no mean to save"),
    ):
        optimizer.state_dict()
    with pytest.warns(UserWarning, match="carry no information"):
        assert not optimizer.marginals()[w][0].any()


@pytest.mark.slow
def test_linear_regression_recovers_the_exact_posterior():
    X, y = regression()
    n, prior = len(X), 2.0
    w = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    generator = torch.Generator().manual_seed(1)
    optimizer = IVON(
        [w],
        lr=0.05,
        ess=n,
        hess_init=1.0,
        betas=(0.9, 0.999),
        weight_decay=prior / n,
        clip_radius=10.0,
        generator=generator,
    )
    means, curvatures = [], []
    for step in range(12000):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (0.5 * (X @ w - y).square().mean()).backward()
        optimizer.step()
        if step >= 4000:
            means.append(w.detach().clone())
            curvatures.append(optimizer.state[w]["hessian"].clone())
    precision = X.T @ X + prior * torch.eye(3, dtype=torch.float64)
    ridge = torch.linalg.solve(precision, X.T @ y)
    assert_near(torch.stack(means).mean(0), ridge, 0.02)
    found = n * torch.stack(curvatures).mean(0) + prior
    assert_near(found, precision.diagonal(), 0.05)
    mean, std = optimizer.marginals()[w]
    assert torch.equal(mean, w)
    assert_near(std, (n * optimizer.state[w]["hessian"] + prior).rsqrt())


def test_the_equations_step_by_step():
    """Algorithm 1, written out once for one weight and two draws."""
    w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    ess, h0, b1, b2, delta, lr, clip = 20.0, 0.3, 0.8, 0.9, 0.01, 0.2, 0.05
    generator = torch.Generator().manual_seed(3)
    optimizer = IVON(
        [w],
        lr=lr,
        ess=ess,
        hess_init=h0,
        betas=(b1, b2),
        weight_decay=delta,
        clip_radius=clip,
        rescale_lr=True,
        generator=generator,
    )
    twin = torch.Generator().manual_seed(3)
    m, h, g = 0.5, h0, 0.0
    for t in range(1, 4):
        grads, products = [], []
        for _ in range(2):
            noise = torch.randn(1, dtype=torch.float64, generator=twin).item()
            shift = noise / math.sqrt(ess * (h + delta))
            gradient = 4 * (m + shift - 1.0) ** 3
            grads.append(gradient)
            products.append(gradient * shift * ess * (h + delta))
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (w - 1.0).pow(4).sum().backward()
        optimizer.step()
        estimate = sum(products) / 2
        g = b1 * g + (1 - b1) * sum(grads) / 2
        h = b2 * h + (1 - b2) * estimate + 0.5 * (1 - b2) ** 2 * (h - estimate) ** 2 / (h + delta)
        step = (g / (1 - b1**t) + delta * m) / (h + delta)
        m -= lr * (h0 + delta) * max(-clip, min(clip, step))
        assert w.item() == pytest.approx(m, rel=1e-12)
        assert optimizer.state[w]["hessian"].item() == pytest.approx(h, rel=1e-12)


@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_agreement_with_ivon_opt(hess_approx):
    ivon = pytest.importorskip("ivon", reason="ivon-opt is compared with where it is installed")
    X, y = (t.float() for t in regression())
    results = []
    for ours in (True, False):
        torch.manual_seed(5)
        w = nn.Parameter(torch.full((3,), 0.1))
        kind = IVON if ours else ivon.IVON
        # Without debiasing, by position.
        rest = (1e-3, 2, hess_approx, 1e-2, False, False, True)
        optimizer = kind([w], 0.1, 60.0, 0.5, 0.9, 0.99, *rest)

        def closure(w=w, optimizer=optimizer):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss = 0.5 * (X @ w - y).square().mean()
                loss.backward()
            return loss

        for _ in range(40):
            optimizer.step(closure)
        results.append(w.detach().clone())
    assert_near(results[0], results[1], 1e-6)


def model_and_optimizer(dtype=torch.float32, **kwargs):
    model = peft_model("bert", dtype=dtype)
    trained = [p for p in model.parameters() if p.requires_grad]
    options = {"ess": 50, "generator": torch.Generator().manual_seed(0), **kwargs}
    return model, IVON(trained, **options)


def loss_of(model, batch=None):
    return model(**(batch or token_batch((4, 3, 5, 2)))).loss


def trained(model, optimizer, steps=3):
    torch.manual_seed(7)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(model).backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_comes_back_to_the_bit(dtype):
    model, optimizer = model_and_optimizer(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params():
        drawn = [p.detach().clone() for p in model.parameters()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, drawn, strict=True)) > 4
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        loss_of(model).backward()
        raise ZeroDivisionError
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="no gradient was computed at drawn weights"):
        optimizer.step()  # what failed was not collected
    with (
        optimizer.sampled_params(),
        pytest.raises(RuntimeError, match="drawn already"),
        optimizer.sampled_params(),
    ):
        pass
    assert all(torch.equal(a, p) for a, p in zip(before, model.parameters(), strict=True))


def test_parameters_without_gradient_are_skipped():
    used, idle = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = IVON([used, idle], ess=10)
    with optimizer.sampled_params(train=True):
        used.square().sum().backward()
    optimizer.step()
    assert not torch.equal(used, torch.ones(2)) and torch.equal(idle, torch.ones(2))
    assert optimizer.state[idle]["step"] == 0


@pytest.mark.parametrize("draws_itself", [False, True])
def test_a_closure_runs_at_several_draws(draws_itself):
    w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    options = {"generator": torch.Generator().manual_seed(1), "mc_samples": 3}
    optimizer, seen = IVON([w], 0.1, 20, 0.3, **options), []

    def closure():
        with optimizer.sampled_params(train=True) if draws_itself else nullcontext():
            optimizer.zero_grad()
            seen.append(w.item())
            loss = w.square().sum()
            loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert len(set(seen)) == 3 and 0.5 not in seen
    assert loss.item() == pytest.approx(sum(x**2 for x in seen) / 3)
    g = sum(2 * x for x in seen) / 3
    assert optimizer.state[w]["momentum"].item() == pytest.approx(0.1 * g)


def shared_and_expert(hess_approx="price", used=(True, False), zeros=False, copied=False):
    """Return what a step made of a parameter that some of its draws use."""
    shared, expert = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    options = {"hess_approx": hess_approx, "clip_radius": 10.0, "generator": generator}
    optimizer = IVON([shared, expert], 0.1, 10, 0.5, betas=(0.5, 0.9), **options)
    for uses in used:
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss = shared.square().sum()
            if uses or zeros:
                loss = loss + float(uses) * expert.square().sum()
            loss.backward()
        if copied:
            shared, expert, optimizer = copy.deepcopy((shared, expert, optimizer))
    optimizer.step()
    return torch.stack([expert.detach(), *(optimizer.state[expert].get(k) for k in STATE)])


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("hess_approx", ["price", "gradsq"])
def test_a_parameter_that_a_draw_does_not_use_has_no_gradient_there(hess_approx, copied):
    """An expert that no token is routed to; its gradient in the other draw counted twice."""
    found = shared_and_expert(hess_approx, copied=copied)
    assert_near(found, shared_and_expert(hess_approx, zeros=True), 1e-12)


def test_a_parameter_that_no_draw_uses_stays_as_it_is():
    expert, momentum, hessian = shared_and_expert(used=(False, False))
    assert (expert == 1).all() and not momentum.any() and (hessian == 0.5).all()


def test_squared_gradients_as_curvature():
    w = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = IVON([w], 0.1, 20, 0.3, beta2=0.9, weight_decay=0.01, hess_approx="gradsq")
    for gradient in (1.5, -0.5):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            (gradient * w).sum().backward()
    optimizer.step()
    estimate = 20 * (1.5**2 + 0.5**2) / 2
    h = 0.9 * 0.3 + 0.1 * estimate + 0.5 * 0.1**2 * (0.3 - estimate) ** 2 / 0.31
    assert optimizer.state[w]["hessian"].item() == pytest.approx(h)


def test_both_ways_of_naming_the_smoothings():
    (w,) = [nn.Parameter(torch.zeros(1))]
    for options in ({"betas": (0.8, 0.7)}, {"beta1": 0.8, "beta2": 0.7}):
        assert IVON([w], ess=5, **options).param_groups[0]["betas"] == (0.8, 0.7)
    assert IVON([w], ess=5, beta2=0.7).param_groups[0]["betas"] == (0.9, 0.7)
    with pytest.raises(TypeError, match="either `betas`, or `beta1`"):
        IVON([w], ess=5, betas=(0.8, 0.7), beta1=0.5)
    with pytest.raises(TypeError, match="needs `ess`"):
        IVON([w])
    with pytest.raises(ValueError, match="hess_approx must be one of"):
        IVON([w], ess=5, hess_approx="hutchinson")
    with pytest.raises(ValueError, match="mc_samples must be at least 1"):
        IVON([w], ess=5, mc_samples=0)


def test_a_closure_runs_at_drawn_weights():
    w = nn.Parameter(torch.zeros(4))
    optimizer = IVON([w], ess=10, hess_init=0.1)
    seen = []

    def closure():
        seen.append(w.detach().clone())
        optimizer.zero_grad()
        loss = (w - 1).square().sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert loss.item() == pytest.approx((seen[0] - 1).square().sum().item())
    assert (w > 0).all() and seen[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_resumes_exactly(dtype, tmp_path):
    straight = trained(*model_and_optimizer(dtype), steps=6)
    model, optimizer = model_and_optimizer(dtype)
    trained(model, optimizer, steps=3)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    rng = torch.get_rng_state()
    other, fresh = model_and_optimizer(dtype)
    other.load_state_dict(model.state_dict())
    fresh.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    torch.set_rng_state(rng)
    for _ in range(3):
        with fresh.sampled_params(train=True):
            fresh.zero_grad()
            loss_of(other).backward()
        fresh.step()
    for a, b in zip(straight.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(s["hessian"].dtype == torch.float32 for s in fresh.state.values())


def drawn(w, optimizer):
    with optimizer.sampled_params():
        return w.detach().clone()


def test_a_saved_generator_goes_on_in_an_optimiser_without_one():
    """As are those of a training in several processes, which the callback gives one each."""
    w = nn.Parameter(torch.zeros(3))
    saving = IVON([w], ess=1, generator=torch.Generator().manual_seed(5))
    drawn(w, saving)
    state = saving.state_dict()
    fresh = IVON([w], ess=1)
    fresh.load_state_dict(state)
    assert torch.equal(drawn(w, fresh), drawn(w, saving))
    state["generator"] = torch.zeros(16, dtype=torch.uint8)  # a GPU's
    elsewhere = IVON([w], ess=1)
    elsewhere.load_state_dict(state)
    assert elsewhere.generator is None
    each_its_own = IVON([w], ess=1, sync=True)
    each_its_own.load_state_dict(saving.state_dict())
    assert each_its_own.generator is None


def test_half_precision_means_move_in_float32():
    w = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = IVON([w], ess=1e6, lr=1e-3, clip_radius=1.0, hess_init=1.0)
    for _ in range(10):  # each step is far below the spacing of bfloat16 at one
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            w.float().sum().backward()
        optimizer.step()
    assert optimizer.state[w]["mean"].max() < 0.995
    assert torch.equal(w, optimizer.state[w]["mean"].bfloat16())
    with torch.no_grad():
        w[0] = 0  # as a mask does
    with pytest.warns(UserWarning, match="carry no information"):  # of a linear loss there is none
        assert optimizer.marginals()[w][0][0] == 0


@pytest.mark.parametrize("converted", [False, True])
def test_values_written_into_a_widened_parameter_count(converted):
    """The state of a half-precision run has a mean of its own."""

    def step(w, optimizer):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            w.float().square().sum().backward()
        optimizer.step()

    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    optimizer = IVON([w], lr=1e-3, ess=100, betas=(0.9, 0.9))
    step(w, optimizer)
    if converted:
        w.data = w.data.float()
    else:
        state, w = optimizer.state_dict(), nn.Parameter(w.detach().float())
        optimizer = IVON([w], lr=1e-3, ess=100, betas=(0.9, 0.9))
        optimizer.load_state_dict(state)
    with torch.no_grad():
        w[0] = 0.0  # as a mask does
    assert torch.equal(optimizer.marginals()[w][0], w)
    step(w, optimizer)
    assert abs(w[0]) < 1e-5


def test_half_precision_curvature_is_not_biased_by_rounding():
    """The loss is ``½ |w − w*|²``, of curvature 1; widths lie below half of a rounding step."""
    torch.manual_seed(0)
    best = 1 + torch.rand(4000)
    w = nn.Parameter(best.bfloat16())
    optimizer = IVON([w], lr=1e-12, ess=1e5, hess_init=1.0, betas=(0.9, 0.99))
    optimizer.weight_state(optimizer.param_groups[0], w)["mean"] = best.clone()
    for _ in range(300):
        with optimizer.sampled_params(train=True):
            w.grad = w.detach() - best.bfloat16()
        optimizer.step()
    hessian = optimizer.state[w]["hessian"]
    assert hessian.mean().item() == pytest.approx(1, abs=0.1)
    assert hessian.max() < 3


def test_the_posterior_goes_to_laplace():
    model, optimizer = model_and_optimizer(
        torch.float64, hess_init=0.05, betas=(0.9, 0.9), weight_decay=0.02
    )
    trained(model, optimizer, steps=5)
    la = optimizer.to_laplace(model, "classification", loader())
    assert type(la) is DiagLoraLaplace
    assert la.prior_precision.item() == pytest.approx(50 * 0.02)
    marginals = la.marginals()
    for p, (mean, std) in optimizer.marginals().items():
        assert torch.equal(marginals[p][0], mean)
        assert_near(marginals[p][1], std)
    batch = token_batch((4, 2))
    mean, covariance = la._glm_predictive_distribution(batch)
    model.eval()
    jacobians, _ = la.backend.jacobians(batch)
    variances = torch.cat([marginals[p][1].flatten() ** 2 for p in la.params])
    assert_near(covariance, torch.einsum("ncp,p,nkp->nck", jacobians, variances, jacobians))
    assert_near(la(batch).sum(-1), torch.ones(2, dtype=torch.float64))
    with torch.no_grad():
        loss = sum(
            F.cross_entropy(la.model(b), b["labels"], reduction="sum").item() for b in loader()
        )
    assert la.loss == pytest.approx(loss)
    assert la.log_marginal_likelihood().isfinite()
    blind = optimizer.to_laplace(model, "classification")
    assert_near(blind(batch), la(batch))
    assert blind.log_marginal_likelihood().isnan()
    la.optimize_prior_precision("glm", "gridsearch", val_loader=loader())


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_posterior_of_a_regression_is_that_of_its_mean_squared_error(outputs):
    """Its curvature, twice the Gauss-Newton matrix over the outputs, is set exactly."""
    model = peft_model("llama", num_labels=outputs).eval()
    model.get_base_model().config.problem_type = "regression"
    batch = token_batch((5,) * 16)
    generator = torch.Generator().manual_seed(0)
    batch["labels"] = torch.randn(16, outputs, generator=generator, dtype=torch.float64)
    data = torch.utils.data.DataLoader(split_rows(batch), batch_size=4)
    noise = math.sqrt(outputs / 2)
    options = {"sigma_noise": noise, "prior_precision": 16 * 1e-2}
    exact = DiagLoraLaplace(model, "regression", **options)
    exact.fit(data)
    optimizer = IVON(model.parameters(), ess=16, weight_decay=1e-2)
    parts = (2 / outputs * exact.H / 16).split([p.numel() for p in exact.params])
    for p, part in zip(exact.params, parts, strict=True):
        state = optimizer.weight_state(optimizer.param_groups[0], p)
        state["hessian"].copy_(part.view_as(p))
    la = optimizer.to_laplace(model, "regression", data)
    assert la.sigma_noise.item() == pytest.approx(noise)
    assert_near(la.posterior_precision, exact.posterior_precision)
    evidence = exact.log_marginal_likelihood().item()
    assert la.log_marginal_likelihood().item() == pytest.approx(evidence)
    for p, (_, std) in optimizer.marginals().items():
        assert_near(la.marginals()[p][1], std)
    other = optimizer.to_laplace(model, "regression", sigma_noise=2.0)
    assert_near(other.posterior_precision, exact.H / 4 + 0.16)


def test_other_likelihoods_than_those_of_a_mean_per_example_are_refused():
    model = peft_model("llama")
    with pytest.raises(ValueError, match=r"likelihood must be one of .*got 'multilabel'"):
        IVON(model.parameters(), ess=10).to_laplace(model, "multilabel")


def test_groups_become_a_layerwise_prior():
    model = peft_model("bert", modules_to_save=None)
    A, B = (
        [p for name, p in model.named_parameters() if part in name] for part in ("lora_A", "lora_B")
    )
    groups = [{"params": A, "weight_decay": 0.1}, {"params": B, "weight_decay": 0.3}]
    la = IVON(groups, ess=10).to_laplace(model, "classification")
    assert sorted({round(value, 5) for value in la.prior_precision.tolist()}) == [1.0, 3.0]
    partial = IVON([{"params": A}], ess=10)
    with pytest.raises(ValueError, match=r"posterior does not hold .*lora_B"):
        partial.to_laplace(model, "classification")


def test_widths_that_say_nothing_are_pointed_out():
    w = nn.Parameter(torch.ones(5))
    optimizer = IVON([w], ess=10)
    with pytest.warns(UserWarning, match="all curvatures lie within 5 % of their start"):
        optimizer.marginals()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.marginals()  # once is enough
    optimizer = IVON([w], ess=10)
    optimizer.weight_state(optimizer.param_groups[0], w)["hessian"][:2] *= 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.marginals()
    assert_near(optimizer.curvature_change(), torch.tensor([1.0, 1, 1, 1, 3, 3, 3]))


@pytest.mark.parametrize(
    "kwargs",
    [{"ess": 0}, {"hess_init": 0.0}, {"weight_decay": 0.0}, {"clip_radius": -1}, {"lr": 0.0}],
)
def test_bad_arguments_are_refused(kwargs):
    name = next(iter(kwargs))
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        IVON([nn.Parameter(torch.ones(1))], **{"ess": 1, **kwargs})
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        IVON([{"params": [nn.Parameter(torch.ones(1))], **kwargs}], ess=1)
    for betas in ((0.9, 1.0), 0.9, (0.9,)):
        with pytest.raises(ValueError, match="betas must lie"):
            IVON([nn.Parameter(torch.ones(1))], ess=1, betas=betas)


def test_quantiles_of_more_weights_than_single_precision_counts():
    weight = torch.nn.Parameter(torch.zeros(2**24 + 4))
    optimizer = IVON([weight], ess=10)
    assert_near(optimizer.curvature_change(), torch.ones(7))


def test_negative_curvature_is_zero_in_a_laplace_posterior(tmp_path):
    """Of IVON's curvature only the sum with the prior is positive."""
    model, optimizer = model_and_optimizer(weight_decay=0.05)
    p = next(iter(optimizer.trainable()))[1]
    state = optimizer.weight_state(optimizer.param_groups[0], p)
    state["hessian"].view(-1)[:3] = -0.01
    share = 3 / sum(p.numel() for _, p in optimizer.trainable())
    with pytest.warns(UserWarning, match=f"curvature of {share:.2%} of the weights is negative"):
        la = optimizer.to_laplace(model, "classification", loader())
    assert int((la.H == 0).sum()) == 3
    la.save_pretrained(tmp_path)
    DiagLoraLaplace.from_pretrained(model, tmp_path)
    la.optimize_prior_precision("glm", "gridsearch", val_loader=loader())
    assert la.log_marginal_likelihood().isfinite() and la(token_batch((4, 2))).isfinite().all()
    with pytest.raises(ValueError, match="negative entries on its diagonal"):
        la.adopt(la.H - 1, 50)


def test_curvature_that_is_not_the_datas_is_refused():
    model, optimizer = model_and_optimizer(hess_approx="gradsq")
    with pytest.raises(ValueError, match="hess_approx='gradsq' estimates some N / batch size"):
        optimizer.to_laplace(model, "classification")
    model = adalora_model("bert")
    optimizer = IVON(model.parameters(), ess=50)
    with pytest.raises(ValueError, match=r"trained with orth_reg_weight=0\.5"):
        optimizer.to_laplace(model, "classification")
    model.peft_config["default"].orth_reg_weight = 0
    assert optimizer.to_laplace(model, "classification").n_data == 50


def test_a_copy_goes_on_by_itself():
    model, optimizer = model_and_optimizer(betas=(0.9, 0.9))
    trained(model, optimizer, 1)
    other, copied = copy.deepcopy((model, optimizer))
    for each in (other, model):
        trained(each, copied if each is other else optimizer, 2)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and a is not b


def test_draws_and_steps_in_one_autocast_block_are_seen_by_the_model():
    """It keeps half-precision copies of weights until its block ends, if its cache is on."""
    seen = {}
    for cache in (True, False):
        torch.manual_seed(0)
        w, x = nn.Parameter(torch.ones(3, 3)), torch.eye(3)
        optimizer = IVON([w], lr=0.5, ess=10)
        seen[cache] = []
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
            for _ in range(2):
                for _ in range(2):
                    with optimizer.sampled_params(train=True):
                        optimizer.zero_grad()
                        seen[cache].append(F.linear(x, w))
                        seen[cache][-1].square().sum().backward()
                    seen[cache].append(F.linear(x, w))
                optimizer.step()
                seen[cache].append(F.linear(x, w))
    for ours, expected in zip(seen[True], seen[False], strict=True):
        assert torch.equal(ours, expected)
