"""Cholesky roots of small factors, as bayesian_lora's example keeps them."""

import pytest
import torch
from torch import nn

from laplace_lora.functional import (
    calculate_kronecker_factors,
    cholesky_decompose_small_factors,
    model_evidence,
    register_hooks,
    stable_cholesky,
    variance,
)
from support.batches import token_batch
from support.functional import S2, adapters_only, factors_of, gaussian
from support.references import assert_near

LL = torch.tensor(-10.0, dtype=torch.float64)


@pytest.mark.parametrize("threshold", [3, 512])
@pytest.mark.parametrize("n_kfac", [None, 4])
def test_results_are_those_of_the_covariances(n_kfac, threshold):
    model, batch = adapters_only("llama"), token_batch((4, 2, 5))
    factors = factors_of(model, "llama", n_kfac=n_kfac, lr_threshold=16)
    kept = cholesky_decompose_small_factors(factors, threshold, "cpu", torch.float64)
    small = [f for pair in factors.values() for f in pair if len(f) < threshold]
    assert small and any(
        not torch.equal(a, b) for a, b in zip(flat(factors), flat(kept), strict=True)
    )
    exact = model_evidence(model, LL, factors, 2, n_kfac, S2)
    assert_near(model_evidence(model, LL, kept, 2, n_kfac, S2), exact)
    _, right = gaussian(model, "llama", batch, factors, n_kfac=n_kfac)
    _, ours = gaussian(model, "llama", batch, kept, n_kfac=n_kfac)
    assert_near(ours, right)


def flat(factors):
    return [factor for pair in factors.values() for factor in pair]


def simple(first, second):
    """One module of weight (3, 8)."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"lora_A": nn.Linear(8, 3, bias=False)}).double()
    jacobian = {"lora_A.weight": torch.randn(2, 2, 3, 8).double()}
    factors = {"lora_A": (first, second)}
    evidence = model_evidence(model, LL, factors, 3, None, 0.5)
    return evidence, variance(torch.zeros(2, 4), jacobian, factors, 0.5, 2, 3, None, "cpu")


def covariance(d):
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    return root @ root.T


def test_a_script_may_keep_roots_of_its_own():
    big = covariance(8)[:, :2]
    right = simple(big, covariance(3))
    for ours, expected in zip(
        simple(big, torch.linalg.cholesky(covariance(3))), right, strict=True
    ):
        assert_near(ours, expected)


def test_what_is_neither_is_refused():
    big, skewed = covariance(8)[:, :2], torch.randn(3, 3).double()
    with pytest.raises(ValueError, match="neither a covariance"):
        simple(big, skewed)
    with pytest.raises(ValueError, match="some are covariances and some Cholesky roots"):
        simple(torch.linalg.cholesky(covariance(8)), covariance(3))


def test_a_diagonal_factor_is_what_the_others_are():
    """Of length 1 it cannot be told from its looks."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 3, bias=False), "b": nn.Linear(3, 1, bias=False)})
    model = model.double()
    covariances = {"a": (covariance(4), covariance(3)), "b": (covariance(3), covariance(1))}
    roots = cholesky_decompose_small_factors(covariances, 99, "cpu", torch.float64)
    assert not torch.equal(roots["b"][1], covariances["b"][1])
    assert_near(
        model_evidence(model, LL, roots, None, None, 0.5),
        model_evidence(model, LL, covariances, None, None, 0.5),
    )


def test_roots_of_length_one_are_known_for_roots(tmp_path):
    """At rank 1 they are the only square factors where all other sides are low-rank."""
    model, batch = adapters_only("bert", r=1), token_batch((4, 2, 5))
    options = {"n_kfac": 2, "lr_threshold": 2}
    factors = factors_of(model, "bert", **options)
    assert {f.shape for f in flat(factors) if f.shape[0] == f.shape[1]} == {(1, 1)}
    kept = cholesky_decompose_small_factors(factors, 2, "cpu", torch.float64)
    torch.save(kept, tmp_path / "factors.pt")
    copied = {name: (x.clone(), g.float().double()) for name, (x, g) in kept.items()}
    exact = model_evidence(model, LL, factors, 1, 2, 10.0)
    _, right = gaussian(model, "bert", batch, factors, 10.0, n_kfac=2, n_lora=1)
    for roots in (kept, copied, torch.load(tmp_path / "factors.pt")):
        assert_near(model_evidence(model, LL, roots, 1, 2, 10.0), exact)
        _, ours = gaussian(model, "bert", batch, roots, 10.0, n_kfac=2, n_lora=1)
        assert_near(ours, right)


def test_diagonal_roots_stand_beside_longer_covariances():
    inputs, grads = covariance(8), covariance(3).diagonal().diag()
    kept = cholesky_decompose_small_factors({"lora_A": (inputs, grads)}, 8, "cpu", torch.float64)
    assert torch.equal(kept["lora_A"][0], inputs) and not torch.equal(kept["lora_A"][1], grads)
    assert_near(simple(*kept["lora_A"]), simple(inputs, grads))


def test_singular_matrices_have_a_stable_root():
    singular = torch.ones(3, 3, dtype=torch.float64)
    root = stable_cholesky(singular)
    assert torch.equal(root, root.tril())
    assert_near(root @ root.T, singular, 1e-6)
    with pytest.raises(ValueError, match="no Cholesky decomposition"):
        stable_cholesky(-singular, max_tries=3)


def test_keywords_match_anywhere_on_request():
    model = nn.ModuleDict({"my_lora_A": nn.Linear(3, 2), "explora": nn.Linear(3, 2)}).double()

    def call(model, x):
        return model["my_lora_A"](x) + model["explora"](x)

    data = [torch.randn(4, 3).double()]
    by = {
        match: set(
            calculate_kronecker_factors(
                model, call, data, target_module_keywords=["lora"], match=match
            )
        )
        for match in ("parts", "substring")
    }
    assert by == {"parts": {"my_lora_A"}, "substring": {"my_lora_A", "explora"}}
    with register_hooks(model, {}, {}, ["LORA"]) as hooks:
        assert len(hooks) > 1
    with pytest.raises(ValueError, match="by any part of its name"):
        register_hooks(model, {}, {}, ["LORA"], match="substring")
    with pytest.raises(ValueError, match="match must be one of"):
        register_hooks(model, {}, {}, ["lora"], match="regex")
