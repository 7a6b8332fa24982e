"""Multi-label models, labels and references."""

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from support.batches import LENGTHS, rows, token_batch
from support.models import peft_model
from support.references import looped_jacobians

MISSING = -100


def labels(examples, outputs=3, missing=True):
    generator = torch.Generator().manual_seed(3)
    y = torch.randint(2, (examples, outputs), generator=generator).double()
    if missing:
        y[0, 1] = torch.nan
        y[1] = torch.nan  # nothing is known of an example
        y[3, 0] = MISSING
    return y


def multilabel_batch(lengths=LENGTHS, missing=True, outputs=3, **kwargs):
    batch = token_batch(lengths, **kwargs)
    return {**batch, "labels": labels(len(lengths), outputs, missing)}


def multilabel_loader(batch_size=3, **kwargs):
    batch = multilabel_batch(**kwargs)
    examples = [rows(batch, n) for n in range(len(batch["labels"]))]
    return DataLoader(examples, batch_size=batch_size)


def multilabel_posterior(cls=KronLoraLaplace, name="bert", fit=True, num_labels=3, **kwargs):
    la = cls(peft_model(name, num_labels=num_labels), "multilabel", **kwargs)
    if fit:
        la.fit(multilabel_loader(outputs=num_labels))
    return la


def known(batch):
    y = batch["labels"]
    return ~(y.isnan() | (y == MISSING))


def explicit_loss(model, batch):
    """Binary cross entropies of the known labels, one after the other."""
    f, y = model(batch), batch["labels"]
    losses = [
        F.binary_cross_entropy_with_logits(f[n, k], y[n, k])
        for n, k in known(batch).nonzero().tolist()
    ]
    return torch.stack(losses).sum()


def explicit_label_ggn(model, batch):
    """The GGN of the known labels, from one autograd call an example and output."""
    J = looped_jacobians(model, batch)
    p = model(batch).sigmoid().detach()
    total = 0.0
    for n, k in known(batch).nonzero().tolist():
        total = total + p[n, k] * (1 - p[n, k]) * torch.outer(J[n, k], J[n, k])
    return total


def explicit_gradient(model, batch):
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(explicit_loss(model, batch), parameters)
    return torch.cat([grad.flatten() for grad in grads])
