"""Products of rows for each example, one by one and several at once."""

import pytest
import torch

from laplace_lora.linalg.row_products import _divisor, grouped_products, products_of_rows


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
