"""Saved and merged reward posteriors."""

import pytest
import torch
from torch.utils.data import DataLoader

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
)
from support.posteriors import DENSE, LOW
from support.preferences import pair_batch, pair_loader, reward_posterior
from support.references import assert_near

EVERY_CLASS = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]


@pytest.mark.parametrize("cls,kwargs", EVERY_CLASS)
def test_saving_and_merging(cls, kwargs, tmp_path):
    la = reward_posterior(cls, prior_precision=2.0, **kwargs)
    la.save_pretrained(tmp_path, precision="exact")
    again = cls.from_pretrained(la.logits_model.model, tmp_path)
    new = pair_batch(seed=1)
    torch.testing.assert_close(again(new), la(new), rtol=0, atol=0)
    examples = pair_loader().dataset
    first, second = (
        cls(la.logits_model.model, "reward_modeling", **kwargs, prior_precision=2.0)
        for _ in range(2)
    )
    first.fit(DataLoader(examples[:2]))
    second.fit(DataLoader(examples[2:]))
    first.merge([second])
    assert first.n_data == 5
    assert_near(first(new), la(new), 1e-4 if kwargs == LOW else 1e-6)
