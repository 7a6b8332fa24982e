"""Coordinates of stacks of matrices in an eigenbasis, however they lie in memory."""

import pytest
import torch

from laplace_lora.linalg.eigen import Eigen


def basis(d: int, k: int) -> Eigen:
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0][:, :k].contiguous()
    return Eigen(vectors, torch.rand(k, dtype=torch.float64), torch.tensor(0.1).double())


@pytest.mark.parametrize("k", [7, 3])  # all directions, and some left out
@pytest.mark.parametrize("columns", [2, 7, 9])  # fewer than rows, as many, more
@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_stack_are_split_and_joined_matrix_by_matrix(k, columns, transposed):
    side = basis(7, k)
    shape = (4, 3, columns, 7) if transposed else (4, 3, 7, columns)
    stack = torch.randn(shape, dtype=torch.float64)
    stack = stack.mT if transposed else stack
    parts = side.split(stack, -2)
    for n in range(4):
        for c in range(3):
            own = side.split(stack[n, c], -2)
            assert len(parts) == len(own) == 1 + (k < 7)
            for part, alone in zip(parts, own, strict=True):
                torch.testing.assert_close(part[n, c], alone)
    expected = side.vectors.T @ stack
    torch.testing.assert_close(parts[0], expected)
    torch.testing.assert_close(side.join(parts, -2), stack)
