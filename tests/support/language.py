"""Texts whose tokens are scored after a prompt, and posteriors fitted on them."""

import torch
from torch.utils.data import DataLoader

from laplace_lora import KronLoraLaplace
from laplace_lora.likelihoods.language_modeling import IGNORED
from laplace_lora.likelihoods.roots import softmax_root
from support.batches import rows, token_batch
from support.models import peft_model
from support.references import explicit_jacobians

LENGTHS, PROMPTS = (4, 6, 3), (1, 3, 2)
EXACT = {"backend_kwargs": {"stochastic": False}}


def text_batch(lengths=LENGTHS, prompts=PROMPTS, **kwargs):
    """Sequences whose tokens are scored after a prompt, labelled as collators do."""
    batch = token_batch(lengths, **kwargs)
    real = batch["attention_mask"].bool()
    answer = real & (batch["attention_mask"].cumsum(1) > torch.tensor(prompts).unsqueeze(1))
    return {**batch, "labels": batch["input_ids"].masked_fill(~answer, IGNORED)}


def text_loader(batch_size=2, batch=None):
    batch = batch or text_batch()
    examples = [rows(batch, n) for n in range(len(batch["labels"]))]
    return DataLoader(examples, batch_size=batch_size)


def language_posterior(
    cls=KronLoraLaplace, name="llama-lm", fit=True, dtype=torch.float64, **kwargs
):
    la = cls(peft_model(name, dtype=dtype), "language_modeling", **kwargs)
    if fit:
        la.fit(text_loader())
    return la


def token_ggn(la, batch):
    """Sum of Jᵀ Λ J over all scored tokens, with a Jacobian for every token and logit."""
    jacobians = torch.cat([J.flatten(2) for J in explicit_jacobians(la.model, batch)], -1)
    roots = softmax_root(la.model(batch).detach())
    J = torch.einsum("csv,svp->csp", roots, jacobians).flatten(0, 1)
    return J.T @ J
