"""Which blocks share a prior precision."""

import pytest

from laplace_lora.tuning.groups import prior_groups


def test_groups_by_matrix_by_block_and_by_function():
    names = [
        "model.layers.0.q.lora_A.default.weight",
        "model.layers.0.q.lora_B.default.weight",
        "model.layers.11.q.lora_A.default.weight",
        "score.weight",
    ]
    assert prior_groups(names, "matrix").tolist() == [0, 1, 0, 2]
    assert prior_groups(names, "block").tolist() == [0, 0, 1, 2]
    assert prior_groups(names, "layerwise").tolist() == [0, 1, 2, 3]
    assert prior_groups(names, lambda name: "score" in name).tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"prior_structure must be .auto., one of"):
        prior_groups(names, "rows")
