"""Losses and roots of their Hessian with respect to a model's outputs.

Every curvature is a sum over examples of ``Jᵀ Λ J`` with ``Λ = S Sᵀ``; the columns of ``S`` cost
one backward pass each. Functions return columns first, ``(columns, batch, outputs)``, so that one
column is the ``grad_outputs`` of one backward pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.likelihoods.drawing import drawn_labels

LARGEST_ROOT = 2**28  # numbers in the columns of a batch's exact root


def identity_root(f: Tensor) -> Tensor:
    """Return one column per output: the rows of the identity, the root of a unit Gaussian's ``Λ``.

    Args:
        f: Outputs, shape ``(batch, outputs)``.

    Returns:
        Columns ``(outputs, batch, outputs)``.
    """
    batch, outputs = f.shape
    eye = torch.eye(outputs, dtype=f.dtype, device=f.device)
    return eye.unsqueeze(1).expand(outputs, batch, outputs)


def contrast_matrix(f: Tensor) -> Tensor:
    """Return the rows ``e_c − e_1``, ``(outputs − 1, outputs)``: all that a softmax sees.

    Args:
        f: Logits, shape ``(…, outputs)``; tells size, dtype and device.
    """
    eye = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
    return eye[1:] - eye[0]


def several_logits(f: Tensor) -> Tensor:
    """Return logits ``(…, outputs)`` as they are.

    Raises:
        ValueError: If there are fewer than two, of which a softmax says nothing.
    """
    if f.shape[-1] < 2:
        raise ValueError(
            "classification needs at least two logits per example, got one; a model with a single "
            "output has likelihood='regression', or 'multilabel' for a label that applies or not, "
            "or needs an `output` callable that makes two logits; and a question with a single "
            "choice has nothing to choose"
        )
    return f


def contrast_root(f: Tensor) -> Tensor:
    """Return the columns ``e_c − e_1``, whose products with ``f`` fix its softmax.

    Args:
        f: Logits, shape ``(batch, outputs)``.

    Returns:
        Columns ``(outputs − 1, batch, outputs)``.

    Raises:
        ValueError: If there are fewer than two outputs.
    """
    return for_each_example(contrast_matrix(several_logits(f)), f)


def anchored_matrix(f: Tensor) -> Tensor:
    """Return the first logit and the contrasts to it, ``(outputs, outputs)``: all the logits say.

    Args:
        f: Logits, shape ``(…, outputs)``; tells size, dtype and device.

    Raises:
        ValueError: If there are fewer than two outputs.
    """
    matrix = torch.eye(several_logits(f).shape[-1], dtype=f.dtype, device=f.device)
    matrix[1:, 0] = -1
    return matrix


def for_each_example(matrix: Tensor, f: Tensor) -> Tensor:
    """Return rows ``(columns, outputs)`` as columns of each example, ``(columns, batch, outputs)``.

    Args:
        matrix: The rows, the same for all examples.
        f: Outputs, shape ``(batch, outputs)``.
    """
    return matrix.unsqueeze(1).repeat(1, len(f), 1)


def softmax_root(f: Tensor) -> Tensor:
    """Return the exact root of the output Hessian of a softmax, with the fewest columns.

    ``Λ = D(I − √p √pᵀ)D`` with ``D = diag(√p)`` has rank ``C − 1``. The Householder reflection
    ``Q = I − 2vvᵀ/‖v‖²`` with ``v = √p + e_C`` maps ``e_C`` to ``−√p``, so the first ``C − 1``
    columns of ``Q`` span the complement of ``√p`` and ``S = D Q[:, :C−1]`` is exact. As
    ``‖v‖² = 2(1 + √p_C) ≥ 2``, nothing is divided by a small number.

    Args:
        f: Logits, shape ``(batch, outputs)``.

    Returns:
        Columns ``(outputs − 1, batch, outputs)``.

    Raises:
        ValueError: If there are fewer than two outputs.
    """
    root_p = F.softmax(several_logits(f).double(), dim=-1).sqrt()
    v = root_p.clone()
    v[:, -1] += 1
    columns = torch.diag_embed(root_p)[:, :, :-1] - torch.einsum(
        "nc,nj->ncj", root_p * v, root_p[:, :-1] / (1 + root_p[:, -1:])
    )
    return columns.permute(2, 0, 1).to(f.dtype)


def sampled_softmax_root(f: Tensor, num_samples: int) -> Tensor:
    """Return an unbiased Monte-Carlo root: ``E[S Sᵀ] = Λ`` over labels drawn from the softmax.

    Args:
        f: Logits, shape ``(batch, outputs)``.
        num_samples: Labels drawn per example; one backward pass each.

    Returns:
        Columns ``(num_samples, batch, outputs)``, scaled by ``1/√num_samples``.
    """
    p = F.softmax(f, dim=-1)
    labels = drawn_labels(p, num_samples).T.unsqueeze(-1)
    # One sample of a whole vocabulary is neither copied nor divided by 1.
    columns = p.unsqueeze(0) if num_samples == 1 else p.repeat(num_samples, 1, 1)
    columns.scatter_add_(-1, labels, columns.new_full(labels.shape, -1))
    return columns if num_samples == 1 else columns.div_(num_samples**0.5)


def standing_apart(columns: Tensor, places: Tensor, count: int) -> Tensor:
    """Return a root with columns of its own for every token of a text.

    Args:
        columns: Of each token by itself, ``(columns, tokens, outputs)``; tokens of all texts.
        places: Number of each token in its text, ``(tokens,)``.
        count: Number of places.

    Returns:
        Columns ``(count · columns, tokens, outputs)``: those of the first place, then of the next.
    """
    own = F.one_hot(places, count).to(columns)
    return torch.einsum("st,csv->tcsv", own, columns).flatten(0, 1)


def softmax_residual(f: Tensor, y: Tensor) -> Tensor:
    """Return the gradient of the cross entropy, ``softmax(f) − onehot(y)``.

    Args:
        f: Logits, shape ``(batch, outputs)``.
        y: Labels, ``(batch,)``.

    Returns:
        One column, ``(1, batch, outputs)``.
    """
    # Not by one-hot labels: over a vocabulary they are larger than the logits.
    minus = f.new_full((len(y), 1), -1)
    return F.softmax(f, dim=-1).scatter_add(-1, y.long().unsqueeze(-1), minus).unsqueeze(0)


def cross_entropy(f: Tensor, y: Tensor) -> Tensor:
    """Return the negative log likelihood of labels in nats, summed over the batch.

    Args:
        f: Logits, shape ``(batch, outputs)``.
        y: Integer or boolean labels, ``(batch,)``.

    Raises:
        ValueError: If labels are not one integer per example, or lie outside the classes.
    """
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
    # Not every kernel takes short or boolean labels, which laplace-torch hands on as they are.
    return F.cross_entropy(f, y.long(), reduction="sum")
