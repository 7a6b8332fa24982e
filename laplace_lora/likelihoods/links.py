"""From Gaussian logits to class probabilities and their entropies.

Approximations of ``E[softmax(f)]`` for Gaussian ``f``, in logs, so that no probability underflows.

All functions take a mean ``(…, batch, classes)`` and a covariance ``(…, batch, classes, classes)``
whose leading dimensions broadcast: several covariances of one batch at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.quadrature import (
    averaged,
    check_noise,
    covariance_root,
    log_softmax_at,
    softmax_log_probabilities,
)
from laplace_lora.likelihoods.roots import contrast_matrix
from laplace_lora.linalg.finite import all_finite

QUADRATURE = "quadrature"
LINKS = (QUADRATURE, "probit", "mc", "bridge", "bridge_norm")


@dataclass(frozen=True)
class Link:
    """A way from Gaussian logits to class probabilities.

    Attributes:
        name: ``"quadrature"`` integrates the softmax over the contrasts of the logits, see
            `quadrature`. ``"probit"``, ``"mc"``, ``"bridge"`` and ``"bridge_norm"`` are
            laplace-torch's.
        noise: Standard normal samples ``(samples, classes − 1)`` for ``"mc"``, common to all
            examples.
        points: Points of ``"quadrature"`` for three or more classes; ``None`` as many as an
            example needs.
        draw: From a number of contrasts to samples of as many, where it is not that of ``noise``:
            questions may have different numbers of choices.

    Raises:
        ValueError: If the name is none of these, or there are no samples.
    """

    name: str
    noise: Tensor | None = None
    points: int | None = None
    draw: Callable[[int], Tensor] | None = None

    def __post_init__(self) -> None:
        if self.name not in LINKS:
            raise ValueError(f"link_approx must be one of {LINKS}, got {self.name!r}")
        if self.noise is not None and not len(self.noise):
            raise ValueError("link_approx='mc' needs n_samples of at least 1")

    @property
    def sees_contrasts(self) -> bool:
        """Whether probabilities depend on the contrasts alone, not on what all logits share."""
        return self.name in (QUADRATURE, "mc")

    def log_probabilities(self, mean: Tensor, covariance: Tensor, relative: bool = False) -> Tensor:
        """Return log class probabilities.

        Args:
            mean: Mean of the logits, ``(…, batch, classes)``.
            covariance: Their covariance, ``(…, batch, classes, classes)``.
            relative: Whether they are contrasts to a first class, which stands at zero: one fewer
                than there are classes. A single logit always is.

        Returns:
            Shape ``(…, batch, classes)``.

        Raises:
            ValueError: If a bridge meets contrasts, or ``"mc"`` has no samples for so many classes.
        """
        relative = relative or mean.shape[-1] == 1
        if not self.sees_contrasts:
            return self._from_logits(mean, covariance, relative)
        if not relative:
            mean, covariance = contrasts_of(mean, covariance)
        if self.name == QUADRATURE:
            return softmax_log_probabilities(mean, covariance, self.points)
        if self.noise is None:
            raise ValueError("link_approx='mc' needs samples")
        noise, contrasts = self.noise, mean.shape[-1]
        if self.draw is not None and noise.shape[-1] != contrasts:
            noise = self.draw(contrasts)
        return averaged(sampled_log_softmax(mean, covariance, noise))

    def _from_logits(self, mean: Tensor, covariance: Tensor, relative: bool) -> Tensor:
        if self.name == "probit":
            if relative:  # the first class's logit is zero
                mean, covariance = F.pad(mean, (1, 0)), F.pad(covariance, (1, 0, 1, 0))
            return probit(mean, covariance)
        if relative:
            raise ValueError(
                f"link_approx={self.name!r} needs two logits; use {QUADRATURE!r}, 'probit' or 'mc'"
            )
        return bridge(mean, covariance, normalised=self.name == "bridge_norm")


def contrasts_of(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return the contrasts ``f_c − f_1`` of two or more logits, ``classes − 1`` of them."""
    rows = contrast_matrix(mean)
    return mean @ rows.T, rows @ covariance @ rows.T


def probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """Scale each logit by ``1/√(1 + π/8 var)``, as for a binary probit (MacKay 1992)."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return F.log_softmax(mean / torch.sqrt(1 + math.pi / 8 * variance), dim=-1)


def sampled_log_softmax(contrasts: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Return the log softmax of each sample of the contrasts ``f_c − f_1``.

    Args:
        contrasts: Mean contrasts, ``(…, batch, classes − 1)``.
        covariance: Their covariance.
        noise: Standard normal samples ``(samples, classes − 1)``, the same for all examples.

    Returns:
        Shape ``(samples, …, batch, classes)``.
    """
    return log_softmax_at(noise, contrasts, covariance_root(covariance))


def gaussian_samples(mean: Tensor, covariance: Tensor, noise: Tensor) -> Tensor:
    """Return ``mean + covariance^½ noise``, shape ``(samples, …, batch, outputs)``.

    Differentiable, see `covariance_root`.

    Raises:
        ValueError: If the noise is of another number of outputs.
    """
    root = covariance_root(covariance).to(mean.dtype)
    check_noise(noise, root)
    return mean + torch.einsum("...ij,sj->s...i", root, noise.to(mean.dtype))


def bridge(mean: Tensor, covariance: Tensor, normalised: bool) -> Tensor:
    """Match a Dirichlet to the logits (Laplace bridge; Hobbhahn et al. 2022, arXiv:2003.01227).

    The logits are first conditioned on summing to zero; ``normalised`` also rescales them by their
    average variance. Logits that move together have no variance then: what rounding leaves in its
    place, of either sign, is raised to its usual size.
    """
    largest = covariance.detach().diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    limits = torch.finfo(covariance.dtype)
    least = 10 * limits.eps * largest + limits.tiny
    total = torch.maximum(covariance.sum((-2, -1)).unsqueeze(-1), least)
    rows = covariance.sum(-1)
    mean = mean - rows * mean.sum(-1, keepdim=True) / total
    outer = rows.unsqueeze(-1) * covariance.sum(-2).unsqueeze(-2)
    variance = (covariance - outer / total.unsqueeze(-1)).diagonal(dim1=-2, dim2=-1)
    variance = torch.maximum(variance, least)
    classes = mean.shape[-1]
    if normalised:
        scale = variance.mean(-1, keepdim=True) / math.sqrt(classes / 2)
        mean, variance = mean / scale.sqrt(), variance / scale
    constant = math.log(1 - 2 / classes) if classes > 2 else -math.inf
    peak = mean - 2 * math.log(classes) + (-mean).logsumexp(-1, keepdim=True)
    log_alpha = torch.logaddexp(peak, torch.full_like(peak, constant)) - variance.log()
    return log_alpha - log_alpha.logsumexp(-1, keepdim=True)


def check_finite(f: Tensor, rows: Tensor | None = None) -> None:
    """Refuse outputs of which no probability can be made.

    Args:
        f: A model's outputs, ``(batch, outputs)``.
        rows: The row of the user's batch that each of them belongs to; their own by default.

    Raises:
        FloatingPointError: If some are not finite; names the rows.
    """
    if all_finite(f):
        return
    places = (~f.detach().isfinite().flatten(1).all(1)).nonzero().flatten()
    named = places if rows is None else rows.to(places.device)[places].unique()
    raise FloatingPointError(
        f"the model's outputs are not finite at rows {named.tolist()} of the batch; "
        "look for NaN or infinity in these rows' inputs or padding"
    )
