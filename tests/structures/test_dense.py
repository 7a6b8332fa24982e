"""The head's dense matrix, whose small eigenvalues are curvature where the prior is smaller."""

import copy

import pytest
import torch

from laplace_lora import FullLoraLLLaplace
from laplace_lora.structures.dense import Dense
from support.batches import loader, token_batch
from support.forgery import forge_tensors
from support.models import peft_model
from support.references import assert_near

BATCH = token_batch((3, 5, 4), seed=3)
SINGLE, DOUBLE = torch.float32, torch.float64


def in_both_dtypes(noise, **kwargs):
    """Posteriors of one model in single and double precision, of features that nearly repeat."""
    model = peft_model("bert", dtype=SINGLE)
    data = loader(8, (3, 6, 4, 6, 1, 5, 2) * 8, "regression")
    found = []
    for each in (model, copy.deepcopy(model).to(DOUBLE)):
        la = FullLoraLLLaplace(each, "regression", sigma_noise=noise, **kwargs)
        la.fit(data)
        found.append(la)
    return found


def test_small_eigenvalues_count_in_single_precision():
    """Such as lie between the prior's and the rounding of the largest."""
    single, double = in_both_dtypes(1e-5)
    values, _ = double.fitted.precision.eigenpairs
    rounding = torch.finfo(SINGLE).eps * values.max()
    assert bool(((values > 10) & (values < rounding)).any())
    assert_near(single(BATCH)[1].double(), double(BATCH)[1], 1e-2)
    assert_near(single.log_det_ratio, double.log_det_ratio, 1e-5)
    assert single(BATCH)[1].dtype == single.H.dtype == single.posterior_scale.dtype == SINGLE


def test_densities_in_single_precision_are_those_of_the_samples():
    single, double = in_both_dtypes(1e-4)
    value = single.sample(1, torch.Generator().manual_seed(0))[0]
    assert_near(single.log_prob(value).double(), double.log_prob(value.double()), 1e-3)


def test_systems_that_are_singular_in_single_precision_are_solved():
    curvature = torch.full((2, 2), 1e9)  # to which 1 adds nothing
    rows = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    found = Dense((2,)).solve(curvature, rows, 1.0)
    assert_near(found, torch.tensor([[1.0, -1.0], [5e-10, 5e-10]]), 1e-6)
    indefinite = torch.tensor([[1e9, 1e9 + 128], [1e9 + 128, 1e9]])  # as an earlier file may be
    assert bool(Dense((2,)).solve(indefinite, rows, 1.0).isfinite().all())


@pytest.mark.parametrize("precision", ["half", "exact"])
def test_files_of_earlier_versions_keep_their_rounding(tmp_path, precision):
    la, _ = in_both_dtypes(0.1)
    la.save_pretrained(tmp_path, precision)
    again = FullLoraLLLaplace.from_pretrained(la.logits_model, tmp_path)
    assert torch.equal(again.curvature, la.curvature) and again.curvature.dtype == DOUBLE

    def to_single(tensors):
        name = next(name for name in tensors if name.startswith("curvature."))
        tensors[name] = tensors[name].to(SINGLE)

    forge_tensors(tmp_path, to_single)
    earlier = FullLoraLLLaplace.from_pretrained(la.logits_model, tmp_path)
    assert earlier.curvature.dtype == SINGLE
    assert_near(earlier(BATCH)[1], la(BATCH)[1], 1e-2)
    again.merge([earlier])
    assert again.curvature.dtype == SINGLE
    assert_near(again.curvature, 2 * la.curvature.float(), 1e-6)

    def to_whole(tensors):
        name = next(name for name in tensors if name.startswith("curvature."))
        tensors[name] = tensors[name].long()

    forge_tensors(tmp_path, to_whole)
    with pytest.raises(ValueError, match="does not fit"):
        FullLoraLLLaplace.from_pretrained(la.logits_model, tmp_path)
