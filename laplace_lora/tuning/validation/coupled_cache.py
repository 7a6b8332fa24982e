"""One pass over a validation set where the data couple the groups of a prior.

The counterpart of `ValidationCache` where the covariance is no sum over the groups.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from laplace_lora.data.distributed import ALONE, Together
from laplace_lora.likelihoods.base import Readout
from laplace_lora.likelihoods.label_check import check_labels
from laplace_lora.linalg.row_grams import group_grams
from laplace_lora.linalg.row_precision import RowPrecision
from laplace_lora.predictive.glm import Predictor
from laplace_lora.tuning.validation.cache import labelled_batches, validation_rows


class CoupledCache:
    """Moments of a validation set as a function of factors ``a`` on the groups' prior precisions.

    With ``K_g``, ``A_g`` and ``G_g`` the groups' parts of ``Z D⁻¹ Zᵀ``, ``J D⁻¹ Zᵀ`` and
    ``J D⁻¹ Jᵀ``, the covariance is ``G − c A (I + c K)⁻¹ Aᵀ`` of the sums ``K = Σ_g K_g/a_g`` and
    so on.
    Memory grows with groups × rows × (rows + validation examples × outputs). Arguments, attributes
    and errors are those of `ValidationCache`; the posterior's precision is a `RowPrecision`.
    """

    def __init__(
        self,
        predictor: Predictor,
        loader: Any,
        groups: Tensor,
        readout: Readout,
        progress_bar: bool | None = None,
        team: Together = ALONE,
    ) -> None:
        posterior = predictor.posterior
        precision = posterior.precision
        assert isinstance(precision, RowPrecision)
        group_of = groups.tolist()
        weights = [precision.delta * weight for weight in precision.pattern]
        self.scale = precision.scale
        self.grams = torch.stack(group_grams(precision.rows, weights, group_of))
        means, labels, priors, onto = [], [], [], []
        for x, y in labelled_batches(posterior, loader, team, progress_bar):
            mean, jacobians = predictor.readout_jacobians(x, readout)
            check_labels(posterior.objective, mean, y, readout)
            prior, projected = precision.group_moments(jacobians, group_of)
            means.append(mean)
            labels.append(y)
            priors.append(prior / precision.delta)
            onto.append(projected / precision.delta)
        rows = validation_rows(team, mean=means, y=labels, prior=priors, onto=onto)
        self.mean, self.y, self.prior, self.onto = rows.values()

    def covariance(self, factors: Tensor) -> Tensor:
        """Return the covariance at factors ``(groups,)``, see `ValidationCache.covariance`."""
        shares = 1 / factors.double()
        gram = self.scale * torch.einsum("g,gmk->mk", shares, self.grams)
        core = torch.linalg.cholesky(gram + torch.eye(len(gram)).to(gram))
        prior = torch.einsum("g,ngcd->ncd", shares, self.prior)
        onto = torch.einsum("g,ngcm->ncm", shares, self.onto)
        half = torch.linalg.solve_triangular(core, onto.flatten(0, 1).T, upper=False)
        half = half.T.unflatten(0, onto.shape[:2])
        return (prior - self.scale * half @ half.mT).to(self.mean.dtype)
