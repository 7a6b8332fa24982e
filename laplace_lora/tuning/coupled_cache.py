"""One pass over a validation set for posteriors whose prior groups are coupled by the data.

The counterpart of `validation`'s cache where the covariance is no sum over the groups; made by
`gram_posterior`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from laplace_lora.data import distributed as sharding
from laplace_lora.linalg.row_precision import RowPrecision, group_grams
from laplace_lora.models.modes import evaluation_mode
from laplace_lora.tuning.validation_cache import labelled_batches


class CoupledCache:
    """Moments of a validation set as a function of factors ``a`` on the groups' prior precisions.

    With ``K_g``, ``A_g`` and ``G_g`` the groups' parts of ``Z D⁻¹ Zᵀ``, ``J D⁻¹ Zᵀ`` and
    ``J D⁻¹ Jᵀ``, the covariance is ``G − c A (I + c K)⁻¹ Aᵀ`` of the sums ``K = Σ_g K_g/a_g`` and
    so on.
    Memory grows with groups × rows × (rows + validation examples × outputs).

    Args:
        la: A fitted `GramPosterior`.
        loader: Validation batches with labels.
        groups: Group of each trainable tensor, ``(tensors,)``.
        progress_bar: Show progress over the batches.

    Attributes:
        mean: Mean logits, ``(examples, outputs)``.
        y: Labels or targets.

    Raises:
        ValueError: If there is no loader, it is empty, or a batch has no labels.
    """

    def __init__(
        self, la: Any, loader: DataLoader | None, groups: Tensor, progress_bar: bool = False
    ) -> None:
        precision: RowPrecision = la.posterior_precision
        of = groups.tolist()
        weights = [precision.delta * weight for weight in precision.pattern]
        self.scale = precision.scale
        self.grams = torch.stack(group_grams(la.rows, weights, of))
        means, labels, priors, onto = [], [], [], []
        for x, y in labelled_batches(la, loader, progress_bar):
            with evaluation_mode(la.model):
                mean, jacobians = la.backend.jacobian_blocks(x)
                prior, projected = precision.group_moments(jacobians, of)
            means.append(mean)
            labels.append(y)
            priors.append(prior / precision.delta)
            onto.append(projected / precision.delta)
        gather = sharding.gather_for(loader)
        self.mean, self.y = gather(torch.cat(means)), gather(torch.cat(labels))
        self.prior, self.onto = gather(torch.cat(priors)), gather(torch.cat(onto))

    def covariance(self, factors: Tensor) -> Tensor:
        """Return the covariance with each group's prior precision multiplied by a factor.

        Args:
            factors: Shape ``(groups,)``; gradients flow through it.

        Returns:
            Shape ``(examples, outputs, outputs)``.
        """
        shares = 1 / factors.double()
        gram = self.scale * torch.einsum("g,gmk->mk", shares, self.grams)
        core = torch.linalg.cholesky(gram + torch.eye(len(gram)).to(gram))
        prior = torch.einsum("g,ngcd->ncd", shares, self.prior)
        onto = torch.einsum("g,ngcm->ncm", shares, self.onto)
        half = torch.linalg.solve_triangular(core, onto.flatten(0, 1).T, upper=False)
        half = half.T.unflatten(0, onto.shape[:2])
        return (prior - self.scale * half @ half.mT).to(self.mean.dtype)
