"""Roots of the Hessian of the negative log likelihood with respect to the model's outputs.

Every curvature is a sum over examples of ``Jᵀ Λ J`` with ``Λ = S Sᵀ``; this module makes the
columns of ``S``, one backward pass each. It knows neither models nor parameters.

All functions return columns first, ``(columns, batch, outputs)``, so that one column is the
``grad_outputs`` of one backward pass.

With the likelihood ``"language_modeling"`` outputs are logits of the vocabulary, one row a scored
token, ``(scored, vocabulary)``, examples one after the other; labels are ``(batch, tokens)``,
`IGNORED` where nothing is scored. The likelihood of an example is the product over its tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.data.labels import IGNORED

CLASSIFICATION = "classification"
REGRESSION = "regression"
LANGUAGE_MODELING = "language_modeling"
EXACT_VOCABULARY = 1024  # tokens up to which the exact root may be asked for


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
        labels = torch.multinomial(p, num_samples, replacement=True).T.unsqueeze(-1)
        columns = p.repeat(num_samples, 1, 1)
        columns.scatter_add_(-1, labels, columns.new_full(labels.shape, -1))
    return columns.div_(num_samples**0.5)


def token_root(f: Tensor, y: Tensor) -> Tensor:
    """Return the exact root of the output Hessian of a language model with a small vocabulary.

    The tokens of an example have columns of their own, as they meet in one gradient; a token of
    another example may share them. Labels drawn independently need no such care: the cross terms
    of `sampled_root` vanish on average.

    Args:
        f: Logits of the scored tokens, shape ``(scored, vocabulary)``.
        y: Labels, ``(batch, tokens)``.

    Returns:
        Columns ``(most scored tokens of an example · (vocabulary − 1), scored, vocabulary)``.

    Raises:
        ValueError: If the vocabulary has more than `EXACT_VOCABULARY` tokens.
    """
    if f.shape[-1] > EXACT_VOCABULARY:
        raise ValueError(
            f"the exact curvature needs {f.shape[-1] - 1} backward passes a token; keep "
            "stochastic=True, and raise `num_samples` for more precision"
        )
    scored = y != IGNORED
    places = F.one_hot((scored.cumsum(1) - 1)[scored]).to(f)
    return torch.einsum("st,csv->tcsv", places, hessian_root(f, CLASSIFICATION)).flatten(0, 1)


def empirical_root(f: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """Return the gradient of the negative log likelihood at the observed labels.

    Args:
        f: Logits or regression means, shape ``(batch, outputs)``.
        y: Labels ``(batch,)``, or targets of the shape of ``f``.
        likelihood: ``"classification"``, ``"regression"`` or ``"language_modeling"``.

    Returns:
        One column, ``(1, batch, outputs)``: ``softmax(f) − onehot(y)`` or ``f − y``.
    """
    if likelihood == REGRESSION:
        return (f - y).unsqueeze(0)
    y = y[y != IGNORED] if likelihood == LANGUAGE_MODELING else y
    return (F.softmax(f, dim=-1) - F.one_hot(y, f.shape[-1]).to(f.dtype)).unsqueeze(0)


def negative_log_likelihood(f: Tensor, y: Tensor, likelihood: str) -> Tensor:
    """Return the negative log likelihood in nats, summed over the batch.

    For regression it is that of unit noise without its constant, ``½‖f − y‖²``, as laplace-torch
    counts it.

    Args:
        f: Logits or regression means, shape ``(batch, outputs)``.
        y: Labels ``(batch,)``, or targets of the shape of ``f``.
        likelihood: ``"classification"``, ``"regression"`` or ``"language_modeling"``.

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
    if likelihood == LANGUAGE_MODELING:
        y = y[y != IGNORED]
        if not len(y):
            return f.sum()
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
