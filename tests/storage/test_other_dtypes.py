"""A posterior saved from a model in one dtype serves the same model in another."""

import copy

import pytest
import torch

from laplace_lora import (
    DiagLoraLaplace,
    FullLoraLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
    LowRankLoraLaplace,
)
from support.batches import loader, token_batch, validation
from support.models import peft_model
from support.posteriors import DENSE, LOW
from support.references import assert_near

SINGLE, DOUBLE = torch.float32, torch.float64
CLASSES = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (KronLoraLaplace, {**DENSE, "eigenvalue_correction": True}),
    (DiagLoraLaplace, {}),
    (LowRankLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
    (FullLoraLaplace, {"row_dtype": "float32"}),
]


@pytest.mark.parametrize("precision", ["half", "exact"])
@pytest.mark.parametrize("before,after", [(SINGLE, DOUBLE), (DOUBLE, SINGLE)])
@pytest.mark.parametrize("cls,kwargs", CLASSES)
def test_files_load_in_another_dtype(tmp_path, cls, kwargs, before, after, precision):
    model = peft_model("bert", dtype=SINGLE).to(before)
    la = cls(model, "classification", prior_precision=3.0, **kwargs)
    la.fit(loader(), evidence_correction=True)
    la.optimize_prior_precision(method="marglik")
    la.save_pretrained(tmp_path, precision)
    other = cls.from_pretrained(copy.deepcopy(model).to(after), tmp_path)
    batch = token_batch((3, 5, 4), seed=3)
    near, found = 2e-3 if precision == "half" else 1e-4, other.predict(batch)
    assert found.covariance.dtype == after
    assert_near(found.covariance.double(), la.predict(batch).covariance.double(), near)
    assert_near(other.log_marginal_likelihood().double(), la.log_marginal_likelihood(), 1e-4)
    other.merge([cls.from_pretrained(copy.deepcopy(model).to(after), tmp_path)])
    other.fit(loader(), override=False)
    other.optimize_prior_precision(method="gridsearch", val_loader=validation())
    other.save_pretrained(tmp_path / "again", "exact")
    again = cls.from_pretrained(other.logits_model.model, tmp_path / "again")
    assert_near(again(batch), other(batch))


def test_rows_wider_than_the_model_say_what_to_do(tmp_path):
    la = FullLoraLaplace(peft_model("bert"), "classification")
    la.fit(loader())
    la.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"row_dtype='float64' is wider .* load the model in that"):
        FullLoraLaplace.from_pretrained(peft_model("bert", dtype=SINGLE), tmp_path)
