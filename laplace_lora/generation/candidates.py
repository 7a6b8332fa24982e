"""A vocabulary's likeliest tokens, and all others as one more class."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.likelihoods.information import entropy


def class_logits(logits: Tensor, candidates: Tensor) -> Tensor:
    """Return the candidates' logits, and that of the tail if there is one.

    Args:
        logits: Of the whole vocabulary, ``(texts, vocabulary)``; gradients flow through.
        candidates: Tokens, ``(texts, k)``.

    Returns:
        Shape ``(texts, k + 1)``; ``(texts, k)`` if the candidates are the whole vocabulary.
    """
    kept = logits.gather(-1, candidates)
    if candidates.shape[-1] == logits.shape[-1]:
        return kept
    rest = logits.scatter(-1, candidates, -torch.inf)
    return torch.cat([kept, rest.logsumexp(-1, keepdim=True)], dim=-1)


def tail_entropy(logits: Tensor, candidates: Tensor) -> Tensor:
    """Return the entropy of the softmax over all tokens but the candidates, ``(texts,)``.

    Args:
        logits: Of the whole vocabulary, ``(texts, vocabulary)``.
        candidates: Tokens, ``(texts, k)``.
    """
    if candidates.shape[-1] == logits.shape[-1]:
        return logits.new_zeros(len(logits))
    return entropy(logits.scatter(-1, candidates, -torch.inf).softmax(-1))


def candidates_of(logits: Tensor, top_k: int, token: Tensor | None) -> Tensor:
    """Return the likeliest tokens, ``(texts, top_k)``.

    Args:
        logits: Of the whole vocabulary, ``(texts, vocabulary)``.
        top_k: How many.
        token: A token of each text that takes the last place if it is none of them.
    """
    chosen = logits.topk(top_k, dim=-1).indices
    if token is not None:
        token = token.to(chosen.device)
        missing = (chosen != token.unsqueeze(-1)).all(-1)
        chosen[:, -1] = torch.where(missing, token, chosen[:, -1])
    return chosen
