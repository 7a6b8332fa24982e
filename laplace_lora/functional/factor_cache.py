"""Validate user-supplied factors and prior variances, and cache the eigendecompositions."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from laplace_lora.functional.cholesky import sides_with_roots
from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import DenseFactor
from laplace_lora.linalg.kron_block import Side
from laplace_lora.linalg.kron_eigen import KronEigen

Factors = Mapping[str, tuple[Tensor, Tensor]]

# bayesian_lora's names of these types, for the annotations of scripts that have them.
activation_t: TypeAlias = Tensor  # of a module's inputs: a covariance, or a root
outgrad_t: TypeAlias = Tensor  # of the gradients with respect to its outputs
KFAC_t: TypeAlias = dict[str, tuple[activation_t, outgrad_t]]  # by module

# One eigendecomposition serves every s2 and batch while a factor exists unchanged: its version, and
# its norm, as writes to `factor.data` leave the version as it is.
Key = tuple[int, bool, float]
_EIGEN: MutableMapping[Tensor, tuple[Key, Eigen]] = WeakTensorKeyDictionary()


def check_ranks(factors: Factors, n_lora: int | None, n_kfac: int | None) -> None:
    """Refuse ranks that the factors do not have.

    Args:
        factors: From `calculate_kronecker_factors`.
        n_lora: LoRA rank, or ``None``.
        n_kfac: Rank of low-rank factors, or ``None``.

    Raises:
        ValueError: If there are no factors, or their ranks differ from those given.
    """
    if not factors:
        raise ValueError("there are no factors")
    shapes = [tensor.shape for pair in factors.values() for tensor in pair]
    roots = {shape[1] for shape in shapes if shape[0] != shape[1]}
    if n_kfac is not None and roots - {n_kfac}:
        raise ValueError(f"n_kfac is {n_kfac}, but low-rank factors have ranks {sorted(roots)}")
    if n_lora is not None and not any(n_lora in (len(x), len(g)) for x, g in factors.values()):
        raise ValueError(f"n_lora is {n_lora}, but no factor has a side of that length")


def checked_variance(s2: Tensor | float) -> Tensor:
    """Return a prior variance as a tensor.

    Raises:
        ValueError: If it is not one positive number.
    """
    s2 = torch.as_tensor(s2)
    if s2.numel() != 1 or not bool(s2 > 0) or not bool(s2.isfinite()):
        raise ValueError(f"s2 is the prior variance, one positive number; got {s2.tolist()}")
    return s2


def decomposed(factors: Factors, device: torch.device | str) -> KronEigen:
    """Return the blocks ``gradient factor ⊗ input factor`` in the order of the factors.

    Args:
        factors: From `calculate_kronecker_factors`, or with Cholesky roots of some.
        device: Device of the result.

    Raises:
        ValueError: If a square factor is neither a covariance nor a root.
    """
    longest = sides_with_roots(factors)
    tensors = [factor for pair in factors.values() for factor in pair]
    norms = dict(zip(map(id, tensors), _norms(tensors), strict=True))

    def eigen(factor: Tensor) -> Eigen:
        is_square = factor.shape[0] == factor.shape[1]
        is_root = not is_square or len(factor) <= longest
        return _eigen(factor, (factor._version, is_root, norms[id(factor)])).to(device)

    blocks: list[list[Side]] = [[eigen(grads), eigen(inputs)] for inputs, grads in factors.values()]
    return KronEigen(blocks)


def _norms(factors: Sequence[Tensor]) -> list[float]:
    """Return the norms of factors; an accelerator is asked once for all."""
    wide = [torch.promote_types(torch.float32, f.dtype) for f in factors]
    norms = [
        torch.linalg.vector_norm(f.detach(), dtype=dtype)
        for f, dtype in zip(factors, wide, strict=True)
    ]
    found: list[float] = torch.stack([norm.to(norms[0].device) for norm in norms]).tolist()
    return found


def _eigen(factor: Tensor, key: Key) -> Eigen:
    is_root = key[1]
    found, eigen = _EIGEN.get(factor, (None, None))
    if eigen is None or found != key:
        wide = factor.detach().to(torch.promote_types(torch.float32, factor.dtype))
        if not is_root:
            eigen = DenseFactor(wide).decompose()
        else:
            vectors, singular, _ = torch.linalg.svd(wide.double(), full_matrices=False)
            eigen = Eigen(vectors.to(wide), singular.square().to(wide), wide.new_zeros(()))
        _EIGEN[factor] = (key, eigen)
    return eigen
