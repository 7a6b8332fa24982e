"""A classifier that knows its training labels by heart."""

import torch

from laplace_lora import KronLoraLaplace
from support.batches import loader, token_batch
from support.posteriors import posterior


def memorised(cls=KronLoraLaplace, **kwargs):
    """A posterior fitted on the tiny BERT after eighty steps on seven texts."""
    la = posterior(cls, name="bert", fit=False, **kwargs)
    batch = token_batch((3, 6, 4, 6, 1, 5, 2))
    optimizer = torch.optim.Adam(la.params, lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        la.objective.nll(la.model(batch), batch["labels"]).backward()
        optimizer.step()
    la.model.zero_grad()
    la.fit(loader())
    return la
