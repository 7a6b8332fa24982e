"""Importance scores and exactly-k selection: known answers."""

import math

import pytest
import torch
from peft.tuners.adalora import RankAllocator
from torch import nn

from laplace_lora import DiagLoraLaplace, KronLoraLaplace
from laplace_lora.adaptive import IVON, PosteriorScore, SensitivityScore
from laplace_lora.adaptive.allocation import adalora_components, set_importance_score
from laplace_lora.adaptive.scores import Components, best
from support.batches import loader, token_batch
from support.models import adalora_model
from support.references import assert_near


class Marginals:
    """A posterior made of given marginals."""

    def __init__(self, values):
        self.values = values

    def marginals(self):
        return self.values


def planted(r=4, layers=2, std=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def tensor(*shape):
        return nn.Parameter(torch.randn(*shape, generator=generator))

    parts = [
        Components(f"layer{i}", tensor(r, 5), tensor(6, r), tensor(r, 1)) for i in range(layers)
    ]
    values = {p: (p.detach(), torch.full_like(p, std)) for c in parts for p in c.parameters}
    return parts, values


def test_triplet_scores_are_the_value_plus_the_means_of_its_vectors():
    parts, values = planted()
    (score, _) = PosteriorScore(Marginals(values), "magnitude").scores(parts)
    A, B, E = (p.detach().abs() for p in parts[0].parameters)
    assert_near(score, E[:, 0] + A.mean(1) + B.mean(0))
    (cost, _) = PosteriorScore(Marginals(values), "pruning_cost").scores(parts)
    assert_near(cost, 0.5 * E[:, 0] ** 2)
    pair = Components("plain", parts[0].A, parts[0].B)
    (cost,) = PosteriorScore(Marginals(values), "pruning_cost").scores([pair])
    assert_near(cost, 0.5 * torch.minimum((A**2).sum(1), (B**2).sum(0)))


def test_planted_importance_is_recovered():
    """Two triplets stand out of the posterior's noise, whatever their magnitude."""
    parts, values = planted(std=1.0)
    for p in parts[1].parameters:
        values[p] = (values[p][0], torch.full_like(p, 1e-3))
    for criterion in ("snr_magnitude", "snr", "precision_root", "pruning_cost"):
        kept = best(parts, PosteriorScore(Marginals(values), criterion).scores(parts), 4)
        assert [int(keep.sum()) for keep in kept] == [0, 4]
    with torch.no_grad():
        for p, dim in zip(parts[0].parameters, (0, 1, 0), strict=True):
            p.mul_(1e-3)
            p.select(dim, 2).fill_(9.0)
    values = {p: (p.detach(), torch.ones_like(p)) for c in parts for p in c.parameters}
    kept = best(parts, PosteriorScore(Marginals(values), "snr_magnitude").scores(parts), 1)
    assert kept[0].tolist() == [False, False, True, False] and not kept[1].any()


def test_with_one_width_snr_and_magnitude_rank_alike():
    parts, values = planted(std=0.37)
    orders = [
        torch.cat(PosteriorScore(Marginals(values), name).scores(parts)).argsort().tolist()
        for name in ("snr", "magnitude")
    ]
    assert orders[0] == orders[1]


@pytest.mark.parametrize("budget", [0, 1, 3, 8])
def test_budgets_are_met_exactly_with_ties(budget):
    parts, _ = planted()
    kept = best(parts, [torch.ones(4), torch.ones(4)], budget)
    flat = torch.cat(kept)
    assert flat.tolist() == [i < budget for i in range(8)]


def test_impossible_selections_are_refused():
    parts, _ = planted()
    scores = [torch.ones(4), torch.ones(4)]
    for budget in (-1, 9):
        with pytest.raises(ValueError, match="there are 8 components"):
            best(parts, scores, budget)
    scores[1][2] = math.nan
    with pytest.raises(FloatingPointError, match="'layer1' is not finite"):
        best(parts, scores, 2)


@pytest.mark.parametrize("betas", [(0.85, 0.85), (0.5, 0.7)])
def test_sensitivity_reproduces_pefts_allocator_at_every_step(betas):
    names = {"beta1": betas[0], "beta2": betas[1]}
    model = adalora_model("bert", dtype=torch.float32, init_r=4, target_r=2, total_step=30, **names)
    adapter, config = "default", model.peft_config["default"]
    inner = model.base_model.model
    stock = RankAllocator(inner, config, adapter)
    score = SensitivityScore() if betas == (0.85, 0.85) else SensitivityScore(**names)
    layers = adalora_components(inner, adapter)
    parameters = [p for layer in layers for p in layer.parameters]
    for step in range(12):
        torch.manual_seed(step)
        for p in parameters:
            p.grad = torch.randn_like(p)
        stock.update_ipt(inner)
        score.observe(parameters)
        for name, p in inner.named_parameters():
            if p in score.averages:
                assert torch.allclose(stock.exp_avg_ipt[name], score.averages[p][0], rtol=1e-6)
                assert torch.allclose(stock.exp_avg_unc[name], score.averages[p][1], rtol=1e-6)
        values = [layer.parameters[-1].detach().clone() for layer in layers]
        pattern = stock.mask_to_budget(inner, budget=9)
        for layer, value in zip(layers, values, strict=True):
            layer.parameters[-1].data.copy_(value)
        kept = best(layers, score.scores(layers), 9)
        for layer, keep in zip(layers, kept, strict=True):
            assert pattern[f"{layer.name}.lora_E.default"] == keep.tolist()


def test_scores_do_not_depend_on_the_order_of_parameters():
    model = adalora_model("bert", dtype=torch.float32)
    trained = [p for p in model.parameters() if p.requires_grad]
    layers = adalora_components(model.base_model.model, "default")
    results = []
    for order in (trained, trained[::-1]):
        groups = [{"params": order[:3]}, {"params": order[3:], "lr": 1e-3}]
        optimizer = IVON(groups, ess=10)
        for i, p in enumerate(trained):
            optimizer.weight_state(optimizer.param_groups[0], p)["hessian"].fill_(1e-3 * (i + 2))
        results.append(PosteriorScore(optimizer).scores(layers))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("cls", [KronLoraLaplace, DiagLoraLaplace])
def test_laplace_posteriors_are_sources(cls):
    model = adalora_model("bert")
    la = cls(model, "classification")
    with pytest.raises(AttributeError, match="not fitted"):
        la.marginals()
    la.fit(loader())
    marginals = la.marginals()
    variances = torch.cat([std.flatten() ** 2 for _, std in marginals.values()])
    if cls is KronLoraLaplace:
        assert_near(variances, la.posterior_precision.to_matrix(-1).diagonal())
    else:
        assert_near(variances, 1 / (la.H + la.prior_precision))
    assert all(torch.equal(p, mean) for p, (mean, _) in marginals.items())
    la.covariance_scale = 4.0
    p = la.params[0]
    assert_near(la.marginals()[p][1], 2 * marginals[p][1])
    layers = adalora_components(model.base_model.model, "default")
    scores = PosteriorScore(la).scores(layers)
    assert all(score.shape == (3,) and score.isfinite().all() for score in scores)


def test_bad_sources_are_refused():
    with pytest.raises(TypeError, match="the source must be an IVON optimiser or a fitted"):
        PosteriorScore(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0))
    parts, values = planted()
    del values[parts[1].B]
    with pytest.raises(ValueError, match="does not cover the adapter of layer 'layer1'"):
        PosteriorScore(Marginals(values)).scores(parts)
    with pytest.raises(RuntimeError, match="no training step was observed"):
        SensitivityScore().scores(parts)
    with pytest.raises(ValueError, match="between 0 and 1"):
        SensitivityScore(beta1=1.0)


def test_a_score_of_ones_own_needs_no_base_class():
    class Norms:
        def observe(self, parameters):
            pass

        def reset(self):
            pass

        def scores(self, components):
            return [c.A.detach().norm(dim=1) for c in components]

    model = adalora_model("bert", dtype=torch.float32)
    allocator = set_importance_score(model, Norms())
    layers = adalora_components(model.base_model.model, "default")
    with torch.no_grad():
        layers[1].A.mul_(100)
    allocator.mask_to_budget(model.base_model.model, 3)
    assert [int((layer.E != 0).sum()) for layer in layers] == [0, 3, 0, 0]
    model(**token_batch((3, 3)))


def test_a_step_that_is_skipped_leaves_no_trace():
    """A gradient scaler's first steps overflow, and are skipped."""
    parts, _ = planted()
    parameters = [p for c in parts for p in c.parameters]
    scores = []
    for overflows in (False, True):
        score = SensitivityScore()
        for step in range(4):
            for p in parameters:
                p.grad = torch.full_like(p, step + 1.0)
            score.observe(parameters)
            if overflows:
                parameters[0].grad[0] = torch.inf
                for p in parameters[1:]:
                    p.grad = torch.full_like(p, torch.nan)
                score.observe(parameters)
        scores.append(torch.cat(score.scores(parts)))
    assert torch.equal(*scores)
