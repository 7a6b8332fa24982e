"""Products of rows for each example, one by one and several at once."""

import pytest
import torch

from laplace_lora.linalg import row_products
from laplace_lora.linalg.row_products import (
    _divisor,
    grouped_products,
    products_of_rows,
    weighted_products,
)


@pytest.mark.parametrize("together", [1, 2, 3, 6])
def test_several_examples_at_once_equal_one_by_one(together):
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 6, 4, 50, dtype=torch.float64, generator=generator)
    expected = torch.stack([x @ y.T for x, y in zip(left, right, strict=True)])
    torch.testing.assert_close(grouped_products(left, right, together), expected)
    torch.testing.assert_close(products_of_rows(left, right), expected)


def test_the_number_of_examples_at_once_divides_the_batch():
    assert [_divisor(n, 16) for n in (1, 7, 16, 17, 30, 64)] == [1, 7, 16, 1, 15, 16]
    assert _divisor(8, 0) == 1


@pytest.mark.parametrize("count", [1, 3, 7])
def test_weighted_products_are_those_of_each_function(count, monkeypatch):
    """Few rows part by part, many for each function alone; functions may be zero in places."""
    monkeypatch.setattr(row_products, "AT_ONCE", 40)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, count, 50, dtype=torch.float64, generator=generator)
    e = torch.rand(50, dtype=torch.float64, generator=generator)

    def functions(e: torch.Tensor) -> torch.Tensor:
        return torch.stack([1 / (e + 0.1), (e > 0.5) * e, e * 0], dim=1)

    found = weighted_products(rows, e, functions)
    assert found.shape == (2, count, count, 3)
    for form, weights in zip(found.unbind(-1), functions(e).T, strict=True):
        torch.testing.assert_close(form, rows @ torch.diag(weights) @ rows.mT)
