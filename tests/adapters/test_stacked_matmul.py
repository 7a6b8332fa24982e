"""A product under `vmap` equals torch's, whichever side is batched."""

import pytest
import torch
from torch.func import vmap

from laplace_lora.adapters.grouped_attention import stacked_matmul

LEFT, RIGHT = (2, 3, 4, 5), (2, 3, 5, 6)
BATCH = 7


@pytest.mark.parametrize("left", [None, 0, 2, 4])
@pytest.mark.parametrize("right", [None, 0, 3])
def test_every_batch_equals_plain_products(left, right):
    torch.manual_seed(0)
    sides = []
    for shape, at in ((LEFT, left), (RIGHT, right)):
        size = list(shape)
        if at is not None:
            size.insert(at, BATCH)
        sides.append(torch.randn(size, dtype=torch.float64))
    if left is None and right is None:
        torch.testing.assert_close(stacked_matmul(*sides), torch.matmul(*sides))
        return
    ours, theirs = (vmap(f, (left, right))(*sides) for f in (stacked_matmul, torch.matmul))
    torch.testing.assert_close(ours, theirs)


def test_it_is_an_operation_in_good_standing():
    torch.library.opcheck(stacked_matmul, (torch.randn(LEFT), torch.randn(RIGHT)))
