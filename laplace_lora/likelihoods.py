"""Roots of the Hessian of the negative log likelihood with respect to the model's outputs.

Every curvature is a sum over examples of ``Jᵀ Λ J`` with ``Λ = S Sᵀ``; this module makes the
columns of ``S``, one backward pass each. It knows neither models nor parameters.

All functions return columns first, ``(columns, batch, outputs)``, so that one column is the
``grad_outputs`` of one backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CLASSIFICATION = "classification"
REGRESSION = "regression"


def identity_root(f: Tensor) -> Tensor:
    """Return one column an output: the rows of the identity, the root of a unit Gaussian's ``Λ``.

    Args:
        f: Outputs, shape ``(batch, outputs)``.

    Returns:
        Columns ``(outputs, batch, outputs)``.
    """
    batch, outputs = f.shape
    eye = torch.eye(outputs, dtype=f.dtype, device=f.device)
    return eye.unsqueeze(1).expand(outputs, batch, outputs)


def contrast_root(f: Tensor) -> Tensor:
    """Return the columns ``e_c − e_C``, whose products with ``f`` fix its softmax.

    Args:
        f: Logits, shape ``(batch, outputs)``.

    Returns:
        Columns ``(outputs − 1, batch, outputs)``.
    """
    columns = identity_root(f)[:-1].clone()
    columns[..., -1] -= 1
    return columns


def difference_root(f: Tensor) -> Tensor:
    """Return the column ``e_2 − e_1``: the reward of the chosen text less that of the rejected one.

    Args:
        f: Both rewards, shape ``(batch, 2)``.

    Returns:
        One column, ``(1, batch, 2)``.
    """
    return -contrast_root(f)


def hessian_root(f: Tensor, likelihood: str) -> Tensor:
    """Return the exact root of the output Hessian with the fewest columns.

    For a softmax ``Λ = D(I − √p √pᵀ)D`` with ``D = diag(√p)`` has rank ``C − 1``. The Householder
    reflection ``Q = I − 2vvᵀ/‖v‖²`` with ``v = √p + e_C`` maps ``e_C`` to ``−√p``, so the first
    ``C − 1`` columns of ``Q`` span the complement of ``√p`` and ``S = D Q[:, :C−1]`` is exact.
    As ``‖v‖² = 2(1 + √p_C) ≥ 2``, nothing is divided by a small number. For a Gaussian with unit
    noise ``S = I``.

    Args:
        f: Logits or regression means, shape ``(batch, outputs)``.
        likelihood: ``"classification"`` or ``"regression"``.

    Returns:
        Columns ``(outputs − 1, batch, outputs)`` for classification, ``(outputs, batch,
        outputs)`` for regression.

    Raises:
        ValueError: If a classifier has fewer than two outputs.
    """
    if likelihood == REGRESSION:
        return identity_root(f)
    if f.shape[-1] < 2:
        raise ValueError(
            "classification needs at least two logits per example, got one; a model with a single "
            "output is a regression model or needs an `output` callable that makes two logits"
        )
    root_p = F.softmax(f.double(), dim=-1).sqrt()
    v = root_p.clone()
    v[:, -1] += 1
    columns = torch.diag_embed(root_p)[:, :, :-1] - torch.einsum(
        "nc,nj->ncj", root_p * v, root_p[:, :-1] / (1 + root_p[:, -1:])
    )
    return columns.permute(2, 0, 1).to(f.dtype)


def sampled_root(f: Tensor, likelihood: str, num_samples: int) -> Tensor:
    """Return an unbiased Monte-Carlo root: ``E[S Sᵀ] = Λ`` over labels drawn from the model.

    Args:
        f: Logits or regression means, shape ``(batch, outputs)``.
        likelihood: ``"classification"`` or ``"regression"``.
        num_samples: Labels drawn per example; one backward pass each.

    Returns:
        Columns ``(num_samples, batch, outputs)``, scaled by ``1/√num_samples``.
    """
    if likelihood == REGRESSION:
        columns = torch.randn(num_samples, *f.shape, dtype=f.dtype, device=f.device)
    else:
        p = F.softmax(f, dim=-1)
        labels = torch.multinomial(p, num_samples, replacement=True)
        columns = (p.unsqueeze(1) - F.one_hot(labels, f.shape[-1]).to(f.dtype)).transpose(0, 1)
    return columns / num_samples**0.5


def empirical_root(f: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """Return the gradient of the negative log likelihood at the observed labels.

    Args:
        f: Logits or regression means, shape ``(batch, outputs)``.
        y: Labels ``(batch,)``, or targets of the shape of ``f``.
        likelihood: ``"classification"`` or ``"regression"``.

    Returns:
        One column, ``(1, batch, outputs)``: ``softmax(f) − onehot(y)`` or ``f − y``.
    """
    if likelihood == REGRESSION:
        return (f - y).unsqueeze(0)
    return (F.softmax(f, dim=-1) - F.one_hot(y, f.shape[-1]).to(f.dtype)).unsqueeze(0)


def negative_log_likelihood(f: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """Return the negative log likelihood in nats, summed over the batch.

    For regression it is that of unit noise without its constant, ``½‖f − y‖²``, as laplace-torch
    counts it.

    Args:
        f: Logits or regression means, shape ``(batch, outputs)``.
        y: Labels ``(batch,)``, or targets of the shape of ``f``.
        likelihood: ``"classification"`` or ``"regression"``.

    Returns:
        A scalar.

    Raises:
        ValueError: If labels lie outside the classes, or targets have another shape than ``f``.
    """
    if likelihood == REGRESSION:
        if y.shape != f.shape:
            raise ValueError(
                f"regression targets have shape {tuple(y.shape)}, the model's outputs "
                f"{tuple(f.shape)}; give one target per output"
            )
        return 0.5 * (f - y).square().sum()
    if y.shape != f.shape[:1] or y.is_floating_point():
        raise ValueError(
            f"classification needs one integer label per example, shape {tuple(f.shape[:1])}; got "
            f"{y.dtype} of shape {tuple(y.shape)}"
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= f.shape[-1]:
        raise ValueError(
            f"labels must lie in 0..{f.shape[-1] - 1} (the model has {f.shape[-1]} classes), got "
            f"values from {low} to {high}"
        )
    return F.cross_entropy(f, y, reduction="sum")
