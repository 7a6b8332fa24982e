"""Eigendecompositions of one side of a Kronecker block: with a residual, or of a diagonal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from laplace_lora.linalg.finite import all_finite

LARGE = 1024  # a side from which on an accelerator may be the quicker one


@dataclass(frozen=True)
class Eigen:
    """One side's eigendecomposition ``U diag(λ) Uᵀ + ρ (I − U Uᵀ)``.

    Attributes:
        vectors: Orthonormal ``U``, shape ``(d, k)``, contiguous as when loaded from a file, since
            the layout decides how products round.
        values: ``λ ≥ 0``, shape ``(k,)``, in no particular order.
        residual: ``ρ ≥ 0``, a scalar; the eigenvalue of the ``d − k`` directions left out.
    """

    vectors: Tensor
    values: Tensor
    residual: Tensor

    def to(self, device: torch.device | str) -> Eigen:
        """Return the eigendecomposition on another device."""
        return Eigen(self.vectors.to(device), self.values.to(device), self.residual.to(device))

    @property
    def multiplicity(self) -> int:
        """Number of directions left out, ``d − k``."""
        return self.vectors.shape[0] - self.vectors.shape[1]

    def parts(self) -> list[tuple[Tensor, int]]:
        """Return eigenvalues with the multiplicity of each: of ``U``, then the residual."""
        parts = [(self.values, 1)]
        if self.multiplicity:
            parts.append((self.residual.reshape(1), self.multiplicity))
        return parts

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return self.vectors.shape[0]

    def basis(self) -> list[Tensor]:
        """Return the tensors that define the directions of the eigenvalues."""
        return [self.vectors]

    def split(self, W: Tensor, dim: int) -> list[Tensor]:
        """Return coordinates of ``W`` for each of the `parts`: along ``U``, and the remainder.

        Args:
            W: Any tensor whose dimension ``dim`` has length ``d``.
            dim: Either -2 or -1.
        """
        U = self.vectors
        coordinates = _times(U.T, W) if dim == -2 else W @ U
        if not self.multiplicity:
            return [coordinates]
        # Subtracting the projection, not its square norm, keeps a small remainder accurate.
        return [coordinates, W - (_times(U, coordinates) if dim == -2 else coordinates @ U.T)]

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """Return the tensor with these coordinates; the inverse of `split`."""
        W = _times(self.vectors, parts[0]) if dim == -2 else parts[0] @ self.vectors.T
        return W + parts[1] if len(parts) == 2 else W

    def matrix_diagonal(self, parts: list[Tensor]) -> Tensor:
        """Return the diagonals of ``n`` matrices with these eigenvectors.

        Args:
            parts: Their eigenvalues for each of the `parts`, ``(k, n)`` and ``(1, n)``.

        Returns:
            Shape ``(d, n)``.
        """
        squares = self.vectors.square()
        diagonal = squares @ parts[0]
        if not self.multiplicity:
            return diagonal
        return diagonal + (1 - squares.sum(1, keepdim=True)).clamp(min=0) @ parts[1]

    def diagonal_from(self, other: Eigen | DiagonalEigen, values: Tensor) -> Tensor:
        """Return the diagonal, in this basis, of a matrix that is diagonal in another basis.

        The directions left out share the mean of their diagonal.

        Args:
            other: A basis of the same space.
            values: The eigenvalues by the other's `parts`, ``(n, …)``, float64.

        Returns:
            One row for each eigenvalue of this basis's `parts`.
        """
        rotation = self.vectors.double().T
        if isinstance(other, Eigen):
            rotation = rotation @ other.vectors.double()
        squares = rotation.square()
        counts = squares.new_ones(squares.shape[1])
        if other.multiplicity:
            missed = (1 - squares.sum(1, keepdim=True)).clamp(min=0)
            squares = torch.cat([squares, missed], dim=1)
            counts = torch.cat([counts, counts.new_full((1,), other.multiplicity)])
        if not self.multiplicity:
            return squares @ values
        mean = (counts - squares.sum(0)).clamp(min=0) / self.multiplicity
        return torch.cat([squares, mean.unsqueeze(0)]) @ values


def _times(matrix: Tensor, stack: Tensor) -> Tensor:
    """Return ``matrix @ stack`` for a stack of matrices, ``(…, d, columns)``.

    Of few columns each, as the Jacobians of ``lora_B``, they are multiplied as one matrix: torch
    would multiply them one by one, several times slower.
    """
    d, columns = stack.shape[-2:]
    if stack.ndim == 2 or columns >= d:
        return matrix @ stack
    product = stack.mT.reshape(-1, d) @ matrix.T
    return product.reshape(*stack.shape[:-2], columns, len(matrix)).mT


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending eigenvalues and eigenvectors of a symmetric matrix.

    Accelerators take longer than the processor over one of the size of a factor.
    """
    if matrix.device.type == "cpu" or len(matrix) > LARGE:
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = (x.to(matrix.device) for x in torch.linalg.eigh(matrix.cpu()))
    return values, vectors


def check_finite(tensor: Tensor) -> None:
    """Refuse sums that are not finite.

    Raises:
        FloatingPointError: If any value is infinite or not a number.
    """
    if not all_finite(tensor):
        raise FloatingPointError("a curvature factor holds values that are not finite")


@dataclass(frozen=True)
class DiagonalEigen:
    """A diagonal matrix with the methods of `Eigen`; its eigenvectors are the unit vectors.

    Attributes:
        values: The diagonal, ``≥ 0``, shape ``(d,)``.
    """

    values: Tensor
    multiplicity = 0  # no direction is left out

    def to(self, device: torch.device | str) -> DiagonalEigen:
        """Return the diagonal on another device."""
        return DiagonalEigen(self.values.to(device))

    @property
    def d(self) -> int:
        """Side length of the matrix."""
        return len(self.values)

    @property
    def vectors(self) -> Tensor:
        """The unit vectors, ``(d, d)``; formed in tests only."""
        return torch.eye(self.d, dtype=self.values.dtype, device=self.values.device)

    def parts(self) -> list[tuple[Tensor, int]]:
        """Return the eigenvalues, each of multiplicity one."""
        return [(self.values, 1)]

    def basis(self) -> list[Tensor]:
        """Return the tensors that define the directions of the eigenvalues: none."""
        return []

    def split(self, W: Tensor, dim: int) -> list[Tensor]:
        """Return ``W``, which is its own coordinates."""
        return [W]

    def join(self, parts: list[Tensor], dim: int) -> Tensor:
        """Undo `split`."""
        return parts[0]

    def matrix_diagonal(self, parts: list[Tensor]) -> Tensor:
        """Return the diagonals of matrices with these eigenvectors: their eigenvalues."""
        return parts[0]

    def diagonal_from(self, other: Eigen | DiagonalEigen, values: Tensor) -> Tensor:
        """Return the diagonal of a matrix that is diagonal in the same basis: unchanged."""
        return values
