"""The test matrices of sketches: fixed for a size, made once while a sketch uses them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from laplace_lora.linalg.half_rows import ALIGNED, split

ROOM = 2**26  # bytes of matrices that nobody uses at the moment
LARGE = 2**20  # numbers from which on a matrix is made in pieces
PIECE = 2048  # rows


class _Shared:
    """Tensors that all users have in common; the latest stay a while after their last user.

    Args:
        room: How many bytes of these.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._lock = threading.RLock()
        self._used: WeakValueDictionary[Hashable, Tensor] = WeakValueDictionary()
        self._latest: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """Return a tensor by its key; make it if it is not there."""
        with self._lock:
            found = self._used.get(key)
            if found is None:
                found = self._used[key] = make()
            self._latest.pop(key, None)
            if found.nbytes <= self._room:
                self._latest[key] = found
            while sum(tensor.nbytes for tensor in self._latest.values()) > self._room:
                del self._latest[next(iter(self._latest))]
            return found


_SHARED = _Shared(ROOM)


def sketch_basis(d: int, l: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a test matrix: ``(d, l)`` orthonormal columns that depend on ``d`` and ``l`` alone."""
    return _SHARED.get((d, l, dtype, device), lambda: _basis(d, l, dtype).to(device))


def sketch_basis_terms(d: int, l: int, device: torch.device) -> Tensor:
    """Return `sketch_basis`, filled up with columns of zeros, split for rows of bfloat16."""

    def make() -> Tensor:
        return split(F.pad(sketch_basis(d, l, torch.float32, device), (0, -l % ALIGNED)))

    return _SHARED.get((d, l, device), make)


def _basis(d: int, l: int, dtype: torch.dtype) -> Tensor:
    if d * l < LARGE or d < 4 * l:
        q, r = torch.linalg.qr(torch.cat(list(_gaussian(d, l))))
        # The signs of a QR factorisation depend on the library; sketches must agree across
        # machines.
        signed: Tensor = q * r.diagonal().sign()
        return signed.to(dtype)
    # The same by a Cholesky factorisation, piece by piece: columns as long as these are nearly
    # orthogonal already.
    gram = torch.zeros(l, l, dtype=torch.float64)
    for piece in _gaussian(d, l):
        gram.addmm_(piece.T, piece)
    core = torch.linalg.cholesky(gram)
    basis, start = torch.empty(d, l, dtype=dtype), 0
    for piece in _gaussian(d, l):
        end = start + len(piece)
        basis[start:end] = torch.linalg.solve_triangular(core, piece.T, upper=False).T
        start = end
    return basis


def _gaussian(d: int, l: int) -> Iterator[Tensor]:
    """Yield a matrix of normal numbers, some rows after the other.

    All but the last are a multiple of 16 numbers, which torch draws at a time; so they are those of
    a matrix drawn at once.
    """
    generator = torch.Generator("cpu").manual_seed(d * 1_000_003 + l)
    left = d
    while left:
        rows = PIECE if left >= 2 * PIECE else left
        yield torch.randn(rows, l, dtype=torch.float64, generator=generator)
        left -= rows
