"""The head's dense matrix, whose small eigenvalues are curvature where the prior is smaller."""

import torch

from laplace_lora.structures.dense import Dense
from support.references import assert_near


def test_systems_that_are_singular_in_single_precision_are_solved():
    curvature = torch.full((2, 2), 1e9)  # to which 1 adds nothing
    rows = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    found = Dense((2,)).solve(curvature, rows, 1.0)
    assert_near(found, torch.tensor([[1.0, -1.0], [5e-10, 5e-10]]), 1e-6)
    indefinite = torch.tensor([[1e9, 1e9 + 128], [1e9 + 128, 1e9]])  # as an earlier file may be
    assert bool(Dense((2,)).solve(indefinite, rows, 1.0).isfinite().all())
