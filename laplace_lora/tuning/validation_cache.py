"""One pass over a validation set, kept so that any prior can be judged afterwards.

The logits' covariance is ``Σ_k M_k / (e_k + δ)``; a `ValidationCache` keeps the eigenvalues ``e``
and products ``M``. How they are searched belongs to `prior` and `calibration`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from laplace_lora.data import distributed as sharding
from laplace_lora.likelihoods.links import log_probabilities

RESOLUTION = math.log(1.02)
DECADES = 10


@dataclass(frozen=True)
class Scoring:
    """How a predictive is judged.

    Attributes:
        link: Link approximation, see `links`.
        noise: Standard normal samples of the ``"mc"`` link, common to everything compared.
        sigma_noise: Observation noise of a regression, ``None`` for a classification.
    """

    link: str
    noise: Tensor | None
    sigma_noise: float | None

    @classmethod
    def of(
        cls, la: Any, link: str, n_samples: int, generator: torch.Generator | None = None
    ) -> Scoring:
        """Return the scoring of a posterior; draws the common samples once."""
        size = (n_samples, max(la.n_outputs - 1, 1))
        draws = sharding.common(
            torch.randn(size, dtype=la._dtype, device=la._device, generator=generator)
        )
        sigma = float(la.sigma_noise) if la.likelihood == "regression" else None
        return cls(link, draws if link == "mc" else None, sigma)

    def log_probabilities(self, mean: Tensor, covariance: Tensor) -> Tensor:
        """Return log class probabilities ``(…, batch, classes)``."""
        return log_probabilities(mean, covariance, self.link, self.noise)

    def nll(self, mean: Tensor, covariance: Tensor, y: Tensor) -> Tensor:
        """Return each example's negative log likelihood in nats, ``(…, batch)``."""
        if self.sigma_noise is None:
            scores = self.log_probabilities(mean, covariance)
            index = y.expand(scores.shape[:-1]).unsqueeze(-1)
            return -scores.gather(-1, index).squeeze(-1)
        eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
        total = covariance + self.sigma_noise**2 * eye
        return -torch.distributions.MultivariateNormal(mean, total).log_prob(y)


def labelled_batches(
    la: Any, loader: DataLoader | None, progress_bar: bool
) -> Iterator[tuple[Any, Tensor]]:
    """Yield each batch of this process, and its labels.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    if loader is None:
        raise ValueError("tuning on a validation set needs `val_loader`, a DataLoader with labels")
    batches = 0
    hidden = not (progress_bar and sharding.is_main())
    bar = tqdm(loader, disable=hidden, desc="Passing over the validation set")
    for batch in sharding.own_batches(loader, map(la.by_example, bar)):
        batches += 1
        yield la.labelled(batch)
    if not batches:
        raise ValueError("the validation loader is empty")


def validation_pass(
    la: Any, loader: DataLoader | None, progress_bar: bool
) -> Iterator[tuple[Tensor, Tensor, Iterator]]:
    """Yield mean logits, labels and gram blocks of each batch, see ``gram_blocks``.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """
    for x, y in labelled_batches(la, loader, progress_bar):
        mean, blocks = la.gram_blocks(x)
        yield mean, y, blocks


class ValidationCache:
    """Moments of a validation set as a function of factors ``a`` on the groups' prior precisions.

    Eigenvalues (relative to the prior of their tensor) within 2 % of each other are merged, and so
    are those below 1e-10 of the largest: a covariance is exact to 1 %, in practice to 1e-4, and its
    memory does not grow with the number of parameters.

    Args:
        la: A fitted posterior.
        loader: Validation batches with labels.
        groups: Group of each trainable tensor, ``(tensors,)``.
        progress_bar: Show progress over the batches.

    Attributes:
        mean: Mean logits, ``(examples, outputs)``.
        y: Labels or targets.
        values: Merged relative eigenvalues of each group, ``(bins,)``.
        products: What they carry, ``(examples, outputs, outputs, bins)`` for each group.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """

    def __init__(
        self, la: Any, loader: DataLoader | None, groups: Tensor, progress_bar: bool = False
    ) -> None:
        prior = la.prior_precision.detach().expand(la.n_layers).tolist()
        of = groups.tolist()
        spectra = la.block_spectra()
        top = max(
            float(e.max()) / delta for s, delta in zip(spectra, prior, strict=True) for e, _ in s
        )
        floor = max(top, 1e-30) * 10.0**-DECADES

        def bins(e: Tensor) -> Tensor:
            return ((e.double().clamp(min=floor) / floor).log() / RESOLUTION).round().long()

        size = int(bins(torch.tensor([max(top, floor)]))) + 1
        sums = [torch.zeros(2, size, dtype=torch.float64) for _ in range(max(of) + 1)]
        for i, spectrum in enumerate(spectra):
            for e, times in spectrum:
                relative = (e.flatten() / prior[i]).double().cpu()
                index = bins(relative)
                sums[of[i]][0].index_add_(0, index, times * relative)
                sums[of[i]][1].index_add_(0, index, torch.full_like(relative, times))
        occupied = [total[1] > 0 for total in sums]
        slots = [used.cumsum(0) - 1 for used in occupied]
        means, labels = [], []
        kept: list[list[Tensor]] = [[] for _ in sums]
        for mean, y, blocks in validation_pass(la, loader, progress_bar):
            shape = (len(mean), mean.shape[1], mean.shape[1])
            parts = [mean.new_zeros(*shape, int(used.sum())) for used in occupied]
            for i, grams in blocks:
                for e, M in grams:
                    slot = slots[of[i]].to(e.device)[bins(e / prior[i])]
                    parts[of[i]].index_add_(-1, slot, M / prior[i])
            means.append(mean)
            labels.append(y)
            for group, part in zip(kept, parts, strict=True):
                group.append(part)
        gather = sharding.gather_for(loader)
        self.mean, self.y = gather(torch.cat(means)), gather(torch.cat(labels))
        self.products = [gather(torch.cat(group)) for group in kept]
        self.values = [
            (total[0, used] / total[1, used]).to(self.mean)
            for total, used in zip(sums, occupied, strict=True)
        ]

    def covariance(self, factors: Tensor) -> Tensor:
        """Return the covariance with each group's prior precision multiplied by a factor.

        Args:
            factors: Shape ``(groups,)``; gradients flow through it.

        Returns:
            Shape ``(examples, outputs, outputs)``.
        """
        parts = [
            M @ (1 / (e + factor))
            for e, M, factor in zip(self.values, self.products, factors, strict=True)
        ]
        return torch.stack(parts).sum(0)
