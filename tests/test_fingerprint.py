"""Fingerprints of models at real sizes."""

import pytest
import torch

from laplace_lora.storage.fingerprint import SAMPLES, sampled_fingerprint

VOCABULARY = (49152, 576)  # SmolLM2-135M: single precision rounds its last index up


def test_a_real_vocabulary_has_a_fingerprint():
    table = torch.zeros(VOCABULARY)
    plain = sampled_fingerprint([("embedding", table)])
    table[-1, -1] = 1.0
    assert sampled_fingerprint([("embedding", table)]) != plain


@pytest.mark.parametrize("rows", [1, 7, 64, 1000, 30522])
def test_the_entries_are_those_of_earlier_versions(rows):
    """Files saved before name the same base model: only an index past the end has changed."""
    size = rows * 768
    before = torch.linspace(0, size - 1, min(SAMPLES, size)).round().long()
    table = torch.zeros(rows, 768)
    plain = sampled_fingerprint([("embedding", table)])
    for index in before[before < size].tolist():
        table.view(-1)[index] = 1.0
        assert sampled_fingerprint([("embedding", table)]) != plain
        table.view(-1)[index] = 0.0
