"""Some of a loader's examples."""

import pytest
import torch

from laplace_lora.data.batches import splits_by_example
from laplace_lora.data.subset import Subset

BATCHES = [{"x": torch.arange(4.0).unsqueeze(1) + 4 * k} for k in range(3)]


def subset(count, divides=splits_by_example):
    return Subset(BATCHES, 12, count, lambda batch: batch, divides)


def test_its_examples_are_those_at_its_places():
    some = subset(5)
    found = torch.cat([batch["x"] for batch in some]).flatten()
    assert sorted(some.places) == found.int().tolist() and some.seen == 12


def test_batches_that_do_not_divide_are_refused_unless_whole():
    assert len(list(subset(12, lambda batch: False))) == 3
    with pytest.raises(ValueError, match=r"cannot be read without the others.*batch_size=1"):
        list(subset(5, lambda batch: False))
