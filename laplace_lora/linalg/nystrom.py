"""Eigenpairs of a sketched matrix, in double precision piece by piece.

A sketch over all weights may be most of the memory, so no copy of it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

PIECE = 1024  # rows of a sketch that are in double precision at once


def leading_eigenpairs(
    sketch: Tensor, basis: Callable[[], Tensor], rank: int
) -> tuple[Tensor, Tensor]:
    """Return the leading eigenpairs of ``F`` by a stabilised Nyström approximation.

    Source: Tropp et al. (2017), arXiv:1706.05736, Algorithm 3. The shift is of the size of the
    rounding errors in ``Y`` and grows until ``Ωᵀ Y`` is numerically positive definite. Not √d times
    larger, as theirs, which computes in the sketch's own precision: eigenvalues below the shift are
    lost. A sketch in float64 that was rounded to less before, as in a file of an earlier version,
    shows it: ``Ωᵀ Y`` is not symmetric.

    Args:
        sketch: ``Y = F Ω``, shape ``(d, l)``.
        basis: Returns ``Ω``, nearly orthonormal columns; called once.
        rank: How many.

    Returns:
        Eigenvalues, ``(rank,)`` in float64, and eigenvectors ``(d, rank)`` in the dtype of ``Ω``.
    """
    test: Tensor | None = basis()
    assert test is not None
    norm = torch.stack([torch.linalg.vector_norm(y.double()) for y in sketch.split(PIECE)]).norm()
    if norm == 0:
        return norm.new_zeros(rank), test[:, :rank].contiguous()
    core, shift = _core(sketch, test, norm)
    # R itself is computed twice, and is never whole. Its triangular factor, unlike its Gram matrix,
    # has small singular values as good as the sketch has them.
    triangular = norm.new_zeros(0, sketch.shape[1])
    for root in _roots(sketch, test, core, shift):
        triangular = torch.linalg.qr(torch.cat([triangular, root]), mode="r").R
    _, singular, right = torch.linalg.svd(triangular, full_matrices=False)
    turn = right[:rank].T / singular[:rank]
    dtype = test.dtype
    if shift < torch.finfo(dtype).eps ** 1.5 * norm:
        test = None  # makes room: such a shift does not show in the vectors
    vectors = sketch.new_empty(len(sketch), rank, dtype=dtype)
    roots = _roots(sketch, test, core, shift)
    for root, part in zip(roots, vectors.split(PIECE), strict=True):
        part.copy_(root @ turn)
    return (singular[:rank].square() - shift).clamp(min=0), vectors


def _core(sketch: Tensor, test: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Cholesky factor of ``Ωᵀ Y`` and the shift, and the shift."""
    d, l = sketch.shape
    product, square = norm.new_zeros(l, l), norm.new_zeros(l, l)
    for y, t in zip(sketch.split(PIECE), test.split(PIECE), strict=True):
        product.addmm_(t.double().T, y.double())
        square.addmm_(t.double().T, t.double())
    shift = torch.finfo(sketch.dtype).eps * norm
    if sketch.dtype == torch.float64:
        shift = torch.maximum(shift, (d / l) ** 0.5 * (product - product.T).norm())
    while True:
        gram = product + shift * square
        core, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
        if not failed:
            return core, shift
        shift = 10 * shift


def _roots(sketch: Tensor, test: Tensor | None, core: Tensor, shift: Tensor) -> Iterator[Tensor]:
    """Yield the rows of ``R``, with ``R Rᵀ`` the approximation of ``F`` and the shift.

    Args:
        sketch: ``Y``.
        test: ``Ω``; ``None`` leaves the shift out.
        core: What `_core` returned.
        shift: The shift.
    """
    for i, y in enumerate(sketch.split(PIECE)):
        wide = y.double()
        if test is not None:
            wide = wide + shift * test[i * PIECE : (i + 1) * PIECE].double()
        yield torch.linalg.solve_triangular(core, wide.T, upper=False).T
