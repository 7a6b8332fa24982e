"""From Gaussian logits to class probabilities and their entropies.

Closed-form and sampled approximations of ``E[softmax(f)]`` for Gaussian ``f``, in logs, so that no
probability underflows.

All functions take a mean ``(…, batch, classes)`` and a covariance ``(…, batch, classes, classes)``
whose leading dimensions broadcast: several covariances of one batch at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.roots import contrast_matrix

LINKS = ("probit", "mc", "bridge", "bridge_norm")


@dataclass(frozen=True)
class Link:
    """A way from Gaussian logits to class probabilities.

    Attributes:
        name: ``"probit"``, ``"mc"``, ``"bridge"`` or ``"bridge_norm"``.
        noise: Standard normal samples ``(samples, classes − 1)`` for ``"mc"``, common to all
            examples.

    Raises:
        ValueError: If the name is none of these.
    """

    name: str
    noise: Tensor | None = None

    def __post_init__(self) -> None:
        if self.name not in LINKS:
            raise ValueError(f"link_approx must be one of {LINKS}, got {self.name!r}")

    def log_probabilities(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Return log class probabilities.

        Args:
            mean: Mean of the logits, ``(…, batch, classes)``.
            covariance: Their covariance, ``(…, batch, classes, classes)``.

        Returns:
            Shape ``(…, batch, classes)``. A single logit is that of the second of two classes, with
            the first at zero.

        Raises:
            ValueError: If a bridge meets a single logit, or ``"mc"`` has no samples.
        """
        if mean.shape[-1] == 1 and self.name.startswith("bridge"):
            raise ValueError(f"link_approx={self.name!r} needs two logits; use 'probit' or 'mc'")
        mean, covariance = _at_least_two(mean, covariance)
        if self.name == "probit":
            return probit(mean, covariance)
        if self.name != "mc":
            return bridge(mean, covariance, normalised=self.name == "bridge_norm")
        if self.noise is None:
            raise ValueError("link_approx='mc' needs samples")
        return averaged(class_samples(mean, covariance, self.noise))


def _at_least_two(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return logits as they are, a single one as that of the second of two classes."""
    if mean.shape[-1] > 1:
        return mean, covariance
    return F.pad(mean, (1, 0)), F.pad(covariance, (1, 0, 1, 0))


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Scale each logit by ``1/√(1 + π/8 var)``, as for a binary probit (MacKay 1992)."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return F.log_softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), dim=-1)


def sampled(contrasts: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Average the softmax over samples of the contrasts ``f_c − f_C``.

    Args:
        contrasts: Mean contrasts, ``(…, batch, classes − 1)``.
        covariance: Their covariance.
        noise: Standard normal samples ``(samples, classes − 1)``, the same for all examples.
    """
    return averaged(sampled_log_softmax(contrasts, covariance, noise))


def averaged(samples: Tensor) -> Tensor:
    """Return the log of the mean probabilities of samples, from logs ``(samples, …, classes)``."""
    return samples.logsumexp(0) - math.log(len(samples))


def class_samples(mean: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Return the log softmax of each sample of two or more logits.

    Args:
        mean: Mean of the logits, ``(…, batch, classes)``.
        covariance: Their covariance, ``(…, batch, classes, classes)``.
        noise: Standard normal samples ``(samples, classes − 1)``, the same for all examples.

    Returns:
        Shape ``(samples, …, batch, classes)``.
    """
    contrasts = contrast_matrix(mean)
    rows = contrasts @ covariance @ contrasts.T
    return sampled_log_softmax(mean @ contrasts.T, rows, noise)


def sampled_log_softmax(contrasts: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Return the log softmax of each sample of the contrasts ``f_c − f_C``.

    Args:
        contrasts: Mean contrasts, ``(…, batch, classes − 1)``.
        covariance: Their covariance.
        noise: Standard normal samples ``(samples, classes − 1)``, the same for all examples.

    Returns:
        Shape ``(samples, …, batch, classes)``.
    """
    draws = gaussian_samples(contrasts, covariance, noise)
    return F.log_softmax(F.pad(draws, (0, 1)), dim=-1)


def entropies(mean: Tensor, covariance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return the entropy of the averaged softmax, and the average entropy of the softmax.

    Their difference is the mutual information between label and weights, the epistemic part
    (Houlsby et al. 2011, *Bayesian active learning*, arXiv:1112.5745). Over common samples it is
    never negative.

    Args:
        mean: Mean of the logits, ``(…, batch, classes)``.
        covariance: Their covariance, ``(…, batch, classes, classes)``.
        noise: Standard normal samples ``(samples, classes − 1)``.

    Returns:
        Nats, shape ``(…, batch)`` each.
    """
    p = class_samples(*_at_least_two(mean, covariance), noise).exp()
    return entropy(p.mean(0)), entropy(p).mean(0)


def entropy(p: Tensor) -> Tensor:
    """Return the entropy of each distribution in nats.

    Args:
        p: Probabilities, ``(…, classes)``; the sum is taken in their dtype.

    Returns:
        Shape ``(…)``.
    """
    terms: Tensor = torch.special.entr(p)
    return terms.sum(-1)


def gaussian_samples(mean: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + covariance^½ noise``, shape ``(samples, …, batch, outputs)``.

    Differentiable; a covariance that is singular or slightly indefinite from rounding is no
    obstacle.
    """
    wide = covariance.double()
    size = wide.detach().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    jitter = 1e-12
    root, failed = torch.linalg.cholesky_ex(wide + jitter * size * eye)
    while bool(failed.any()) and jitter < 1:
        jitter *= 100
        root, failed = torch.linalg.cholesky_ex(wide + jitter * size * eye)
    if bool(failed.any()):
        raise FloatingPointError("the predictive covariance is not finite or far from positive")
    return mean + torch.einsum("...ij,sj->s...i", root.to(mean.dtype), noise.to(mean.dtype))


def bridge(mean: Tensor, covariance: Tensor, normalised: bool) -> Tensor:
    """Match a Dirichlet to the logits (Laplace bridge; Hobbhahn et al. 2022, arXiv:2003.01227).

    The logits are first conditioned on summing to zero; ``normalised`` also rescales them by their
    average variance.
    """
    total = covariance.sum((-2, -1)).unsqueeze(-1)
    rows = covariance.sum(-1)
    mean = mean - rows * mean.sum(-1, keepdim=True) / total
    outer = rows.unsqueeze(-1) * covariance.sum(-2).unsqueeze(-2)
    variance = (covariance - outer / total.unsqueeze(-1)).diagonal(dim1=-2, dim2=-1)
    classes = mean.shape[-1]
    if normalised:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    constant = math.log(1 - 2 / classes) if classes > 2 else -math.inf
    peak = mean - 2 * math.log(classes) + (-mean).logsumexp(-1, keepdim=True)
    log_alpha = torch.logaddexp(peak, torch.full_like(peak, constant)) - variance.log()
    return log_alpha - log_alpha.logsumexp(-1, keepdim=True)
