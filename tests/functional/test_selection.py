"""Modules are chosen, and factors paired, by whole parts of their names."""

import pytest
import torch

from laplace_lora.functional import calculate_kronecker_factors, jacobian_mean, variance
from support.functional import Named
from support.references import assert_near


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
