"""Cholesky factors of matrices that rounding may have made indefinite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TRIES = 8  # of a growing shift


def shifted_cholesky(matrices: Tensor) -> Tensor:
    """Return Cholesky factors of positive semi-definite matrices.

    Those that rounding has made indefinite get a small multiple of their trace on the diagonal, as
    small as is enough. A factor is not a number where a matrix is none.

    Args:
        matrices: Shape ``(…, n, n)``.

    Returns:
        Lower triangular, of the same shape.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrices)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    traces = matrices.detach().diagonal(dim1=-2, dim2=-1).sum(-1)
    shift = torch.finfo(torch.float32).eps * traces
    for _ in range(TRIES):
        if not failed.any():
            return root
        added = torch.where(failed > 0, shift, 0.0)[..., None, None] * eye
        root, failed = torch.linalg.cholesky_ex(matrices + added)
        shift = 10 * shift
    return root.masked_fill((failed > 0)[..., None, None], math.nan)
