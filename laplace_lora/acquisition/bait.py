"""BAIT: the examples whose labels make the predictions of the whole pool most certain."""

from __future__ import annotations

import torch
from torch import Tensor

from laplace_lora.acquisition.joint_samples import JointSamples
from laplace_lora.likelihoods.roots import softmax_root

AHEAD = 2  # times as many are chosen first, and the least useful given back


def bait(samples: JointSamples, n: int) -> tuple[Tensor, Tensor]:
    """Choose examples that minimise the pool's mean predictive variance, by Fisher information.

    ``tr(P_B⁻¹ F)`` with the posterior precision ``P_B`` after labelling the batch and the pool's
    mean Fisher information ``F``, in the space that samples of the weights span; greedily forward
    to twice as many, then back.

    Source: Ash, Goel, Krishnamurthy, Kakade (2021), arXiv:2106.09675, algorithm 1.

    Args:
        samples: Of the pool.
        n: How many to choose.

    Returns:
        Places of the chosen, ``(n,)``, and by how much giving each back would raise
        ``tr(P_B⁻¹ F)``, in the order of falling worth.
    """
    rows = fisher_rows(samples)
    examples, _, size = rows.shape
    flat = rows.flatten(0, 1)
    fisher = flat.T @ flat / examples
    covariance = torch.eye(size, dtype=rows.dtype, device=rows.device)
    free = torch.ones(examples, dtype=torch.bool, device=rows.device)
    chosen: list[int] = []
    for _ in range(min(AHEAD * n, examples)):
        gain = _change(rows, covariance, fisher, 1.0).masked_fill(~free, -torch.inf)
        best = int(gain.argmax())
        chosen.append(best)
        free[best] = False
        covariance = _updated(covariance, rows[best], 1.0)
    while len(chosen) > n:
        loss = _change(rows[chosen], covariance, fisher, -1.0)
        covariance = _updated(covariance, rows[chosen.pop(int(loss.argmin()))], -1.0)
    worth = _change(rows[chosen], covariance, fisher, -1.0)
    order = worth.argsort(descending=True)
    return torch.tensor(chosen)[order.cpu()], worth[order].cpu()


def fisher_rows(samples: JointSamples) -> Tensor:
    """Return ``R`` with ``Rᵀ R`` an example's Fisher information, the posterior being ``N(0, I)``.

    Returns:
        Shape ``(examples, contrasts, samples)``, float64.
    """
    features = samples.deviations.double() / len(samples.deviations) ** 0.5
    logits = torch.nn.functional.pad(samples.mean.double(), (1, 0))
    roots = softmax_root(logits)[..., 1:]  # the first class's logit stands at zero
    return torch.einsum("cnk,snk->ncs", roots, features)


def _change(rows: Tensor, covariance: Tensor, fisher: Tensor, sign: float) -> Tensor:
    """Return by how much ``tr(V F)`` falls with each added (1), or rises with each removed (−1)."""
    seen = rows @ covariance
    core = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    core = core + sign * seen @ rows.mT
    moved = seen @ fisher @ seen.mT
    change: Tensor = torch.linalg.solve(core, moved).diagonal(dim1=-2, dim2=-1).sum(-1)
    return change


def _updated(covariance: Tensor, rows: Tensor, sign: float) -> Tensor:
    """Return the covariance with an example added (1) or removed (−1)."""
    seen = rows @ covariance
    core = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) + sign * seen @ rows.T
    updated: Tensor = covariance - sign * seen.T @ torch.linalg.solve(core, seen)
    return updated
