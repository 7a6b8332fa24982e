"""A sketch in float64 keeps directions far below the rounding of the first in single precision."""

import copy

import pytest
import torch

from laplace_lora import LowRankLoraLaplace
from support.batches import loader, token_batch
from support.forgery import forge_tensors
from support.models import peft_model
from support.references import assert_near

BATCH = token_batch((3, 5, 4), seed=3)
SINGLE, DOUBLE = torch.float32, torch.float64


def in_both_dtypes(**kwargs):
    model = peft_model("bert", dtype=SINGLE)
    data = loader(8, (3, 6, 4, 6, 1, 5, 2) * 8, "regression")
    found = []
    for each in (model, copy.deepcopy(model).to(DOUBLE)):
        la = LowRankLoraLaplace(each, "regression", sigma_noise=1e-5, **kwargs)
        la.fit(data)
        found.append(la)
    return found


@pytest.mark.parametrize("rank", [100, 500])
def test_small_directions_count_in_single_precision(rank):
    """As a sketch, and where that has as many columns as there are weights."""
    single, double = in_both_dtypes(rank=rank)
    values = double.fitted.precision.eigenvalues
    rounding = torch.finfo(SINGLE).eps * values.max()
    assert bool(((values > 10) & (values < rounding)).any())
    assert_near(single(BATCH)[1].double(), double(BATCH)[1], 1e-2)
    assert_near(single.log_det_ratio, double.log_det_ratio, 1e-5)
    assert single(BATCH)[1].dtype == single.rows.dtype == SINGLE


def test_files_of_earlier_versions_show_their_rounding(tmp_path):
    """Directions that are none but rounding would be curvature."""
    la, _ = in_both_dtypes(rank=100)
    la.save_pretrained(tmp_path, precision="exact")

    def to_single(tensors):
        tensors["curvature.0"] = tensors["curvature.0"].to(SINGLE)

    forge_tensors(tmp_path, to_single)
    earlier = LowRankLoraLaplace.from_pretrained(la.logits_model, tmp_path)
    found, expected = (each.fitted.precision.eigenvalues for each in (earlier, la))
    large = int((expected > 1e3 * torch.finfo(SINGLE).eps * expected[0]).sum())
    assert_near(found[:large], expected[:large], 1e-2)
    assert float(found[-1]) < float(expected[large])
    assert_near(found[large:].sum(), expected[large:].sum(), 0.5)
    earlier.merge([la])
    assert_near(earlier.fitted.precision.eigenvalues[0], 2 * expected[0], 1e-5)
