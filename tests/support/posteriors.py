"""Fitted posteriors of a language model with answer tokens or of an encoder."""

import torch

from laplace_lora import (
    DiagLoraLaplace,
    DiagLoraLLLaplace,
    FullLoraLLLaplace,
    KronLoraLaplace,
    KronLoraLLLaplace,
)
from support.batches import loader
from support.models import TARGETS, peft_model

DENSE = {"factor_rank": None}
LOW = {"factor_rank": 2, "low_rank_threshold": 4}
CLASSES = [(KronLoraLaplace, DENSE), (KronLoraLaplace, LOW), (DiagLoraLaplace, {})]
EVERY_CLASS = [
    (KronLoraLaplace, DENSE),
    (KronLoraLaplace, LOW),
    (DiagLoraLaplace, {}),
    (KronLoraLLLaplace, {}),
    (DiagLoraLLLaplace, {}),
    (FullLoraLLLaplace, {}),
]


def posterior(cls=KronLoraLaplace, name="llama-lm", dtype=torch.float64, r=2, fit=True, **kwargs):
    """A classifier by answer tokens, where the model is a language model, or by its head."""
    targets = TARGETS if name.endswith("-lm") else None
    la = cls(peft_model(name, dtype=dtype, r=r), "classification", target_ids=targets, **kwargs)
    if fit:
        la.fit(loader())
    return la


def fitted(cls=KronLoraLaplace, model=None, **kwargs):
    """A classifier with a tuned prior, on the tiny BERT or a given model."""
    la = cls(model or peft_model("bert"), "classification", **kwargs)
    la.fit(loader())
    la.optimize_prior_precision()
    return la


def fitted_on(model, name, cls=KronLoraLaplace, **kwargs):
    """A classifier on a given model, whose name says whether it answers by tokens."""
    la = cls(
        model, "classification", target_ids=TARGETS if name.endswith("-lm") else None, **kwargs
    )
    la.fit(loader())
    return la
