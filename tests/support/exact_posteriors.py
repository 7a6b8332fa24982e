"""Posteriors with the exact GGN: FullLoraLaplace and LowRankLoraLaplace."""

import torch

from laplace_lora import FullLoraLaplace, LowRankLoraLaplace
from support.batches import loader, token_batch
from support.models import peft_model

ENOUGH = {"rank": 25}  # directions for seven examples of up to three outputs
BOTH = [(FullLoraLaplace, {}), (LowRankLoraLaplace, ENOUGH)]
NEW_BATCH = token_batch((4, 2, 5), seed=3)  # not among the fitted examples
LAYERS = 10  # trainable tensors of the tiny BERT


def exact_posterior(
    cls=FullLoraLaplace, likelihood="classification", classes=3, fit=True, **kwargs
):
    dtype = kwargs.pop("dtype", torch.float64)
    la = cls(peft_model("bert", num_labels=classes, dtype=dtype), likelihood, **kwargs)
    if fit:
        la.fit(loader(likelihood=likelihood, labels=classes))
    return la
