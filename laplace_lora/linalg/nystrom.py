"""Eigenpairs of a sketched matrix, in double precision piece by piece.

A sketch over all weights may be most of the memory, so no copy of it is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from laplace_lora.linalg.eigen import symmetric_eigen

PIECE = 2048  # rows of a sketch that are in double precision at once


def leading_eigenpairs(sketch: Tensor, test: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the leading eigenpairs of ``F`` by a stabilised Nyström approximation.

    Source: Tropp et al. (2017), arXiv:1706.05736, Algorithm 3. The shift is of the size of the
    rounding errors in ``Y`` and grows until ``Ωᵀ Y`` is numerically positive definite. Not √d times
    larger, as theirs, which computes in the sketch's own precision: eigenvalues below the shift are
    lost.

    Args:
        sketch: ``Y = F Ω``, shape ``(d, l)``.
        test: ``Ω``, orthonormal columns.
        rank: How many.

    Returns:
        Eigenvalues, ``(rank,)`` in float64, and eigenvectors ``(d, rank)`` in the sketch's dtype.
    """
    dtype = sketch.dtype
    pieces = list(zip(sketch.split(PIECE), test.split(PIECE), strict=True))
    norm = torch.stack([torch.linalg.vector_norm(y.double()) for y, _ in pieces]).norm()
    if norm == 0:
        return norm.new_zeros(rank), test[:, :rank].contiguous()
    l = sketch.shape[1]
    product, square = norm.new_zeros(l, l), norm.new_zeros(l, l)
    for y, t in pieces:
        product.addmm_(t.double().T, y.double())
        square.addmm_(t.double().T, t.double())
    shift = torch.finfo(dtype).eps * norm
    while True:
        gram = product + shift * square
        core, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
        if not failed:
            break
        shift = 10 * shift

    def roots() -> Iterator[Tensor]:
        """Yield the rows of ``R``, with ``R Rᵀ`` the approximation of ``F`` and the shift."""
        for y, t in pieces:
            shifted = y.double() + shift * t.double()
            yield torch.linalg.solve_triangular(core, shifted.T, upper=False).T

    if dtype == torch.float64:
        basis, triangular = torch.linalg.qr(torch.cat(list(roots())))
        left, singular, _ = torch.linalg.svd(triangular, full_matrices=False)
        values, vectors = singular[:rank].square(), basis @ left[:, :rank]
    else:
        # The shift bounds the condition of R's Gram matrix, so that its eigenvectors are good
        # enough, and quicker to get. R itself is computed twice, and is never whole.
        gram.zero_()
        for root in roots():
            gram.addmm_(root.T, root)
        values, inner = symmetric_eigen(gram)
        values, inner = values.flip(0)[:rank], inner.flip(1)[:, :rank]
        turn, vectors = inner / values.sqrt(), sketch.new_empty(len(sketch), rank)
        for root, part in zip(roots(), vectors.split(PIECE), strict=True):
            part.copy_(root @ turn)
    return (values - shift).clamp(min=0), vectors.contiguous()
