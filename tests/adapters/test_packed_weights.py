"""Packed weights are told from plain ones, and counted whatever their layout is."""

from collections import Counter

import pytest
import torch
from torch import nn

from laplace_lora.adapters.packed_weights import (
    bits_of,
    half_bytes,
    has_packed_weights,
    packed_parts,
)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.float32])
def test_half_bytes_are_counted_as_a_loop_counts_them(dtype):
    weight = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).mul(90).to(dtype)
    counts = Counter()
    for octet in weight.numpy().tobytes():
        counts.update([octet % 16, octet // 16])
    assert half_bytes(weight).tolist() == [counts[half] for half in range(16)]


def test_a_layout_changes_no_count():
    codes = torch.randint(0, 256, (6, 4), dtype=torch.uint8)
    swapped = (codes % 16 * 16 + codes // 16).T.flatten()
    assert torch.equal(half_bytes(swapped), half_bytes(codes))


def test_plain_weights_are_not_packed():
    layer = nn.Linear(3, 2)
    assert not has_packed_weights(layer) and not packed_parts(layer.weight)
    layer.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    assert has_packed_weights(layer) and not has_packed_weights(nn.Sequential(layer))
    layer.weight = nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)
    assert not has_packed_weights(layer)  # a layer may count what it has seen


@pytest.mark.parametrize("sides", [(3, 2), ((3, 1), 2), (None, None)])
def test_layers_whose_sides_are_no_numbers_have_no_bits(sides):
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.zeros(2, 3, dtype=torch.int8), requires_grad=False)
    layer.in_features, layer.out_features = sides
    assert bits_of(layer) == (8 if sides == (3, 2) else None)
