"""Two processes that share texts with labelled tokens or answers find what one does."""

import pytest
import torch

from support.references import assert_near
from support.shared_texts import everything, worker
from support.spawned import exit_codes

pytestmark = pytest.mark.slow


def test_two_processes_equal_one(tmp_path):
    expected = everything(shared=False)
    assert exit_codes(worker, tmp_path) == [0, 0]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert list(found) == list(expected)
        for call, value in expected.items():
            assert_near(found[call].double(), value.double(), 1e-6)
