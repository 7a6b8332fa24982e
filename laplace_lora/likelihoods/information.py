"""Entropies of class probabilities, and the part of them that is the posterior's."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.likelihoods.links import contrasts_of, sampled_log_softmax
from laplace_lora.likelihoods.sigmoid import binary_log_probabilities, mean_binary_entropy


def entropies(
    mean: Tensor, covariance: Tensor, noise: Tensor | None, relative: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the entropy of the averaged softmax, and how far the average entropy is below it.

    That is the mutual information between label and weights, the epistemic part (Houlsby et al.
    2011, *Bayesian active learning*, arXiv:1112.5745). It is never negative. Of a narrow posterior
    it is far below what single precision rounds the entropies by.

    Args:
        mean: Mean of the logits, ``(…, batch, classes)``.
        covariance: Their covariance, ``(…, batch, classes, classes)``.
        noise: Standard normal samples ``(samples, classes − 1)``; ``None`` integrates two classes
            exactly.
        relative: Whether they are contrasts to a first class, see `Link`.

    Returns:
        Nats, shape ``(…, batch)`` each.

    Raises:
        ValueError: If three or more classes have no samples.
    """
    if not relative and mean.shape[-1] > 1:
        mean, covariance = contrasts_of(mean, covariance)
    if noise is None:
        if mean.shape[-1] > 1:
            raise ValueError("entropies of three or more classes need samples")
        wide, variance = mean[..., 0].double(), covariance[..., 0, 0]  # float32 rounds 1 − p to 1
        total = entropy(binary_log_probabilities(wide, variance).exp())
        information = (total - mean_binary_entropy(wide, variance)).clamp(min=0)
        return total.to(mean.dtype), information.to(mean.dtype)
    return entropies_of(sampled_log_softmax(mean, covariance, noise))


def entropies_of(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entropy of averaged probabilities, and the mutual information, see `entropies`.

    Args:
        log_p: Log probabilities under each sample, ``(samples, …, classes)``.

    Returns:
        Nats, shape ``(…)`` each.
    """
    p = log_p.double().exp()
    total = entropy(p.mean(0))
    information = (total - entropy(p).mean(0)).clamp(min=0)
    return total.to(log_p.dtype), information.to(log_p.dtype)


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of each distribution in nats.

    Args:
        p: Probabilities, ``(…, classes)``; the sum is taken in their dtype.

    Returns:
        Shape ``(…)``.
    """
    terms: Tensor = torch.special.entr(p)
    return terms.sum(-1)
