"""Factors as a user hands them over, and as a `KronEigen`.

Whether they fit the ranks that go with them, and one eigendecomposition for each, kept. What it is
good for belongs to `posterior`, where factors come from to `kronecker`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import DenseFactor
from laplace_lora.linalg.kron_block import Side
from laplace_lora.linalg.kron_eigen import KronEigen

Factors = Mapping[str, tuple[Tensor, Tensor]]

# One eigendecomposition serves every s2 and batch, for as long as the factor lives unchanged.
_EIGEN: Any = WeakTensorKeyDictionary()


def check_ranks(factors: Factors, n_lora: int | None, n_kfac: int | None) -> None:
    """Refuse ranks that the factors do not have.

    Args:
        factors: From `calculate_kronecker_factors`.
        n_lora: LoRA rank, or ``None``.
        n_kfac: Rank of low-rank factors, or ``None``.

    Raises:
        ValueError: If there are no factors, or they have other ranks.
    """
    if not factors:
        raise ValueError("there are no factors")
    shapes = [tensor.shape for pair in factors.values() for tensor in pair]
    roots = {shape[1] for shape in shapes if shape[0] != shape[1]}
    if n_kfac is not None and roots - {n_kfac}:
        raise ValueError(f"n_kfac is {n_kfac}, but low-rank factors have ranks {sorted(roots)}")
    if n_lora is not None and not any(n_lora in (len(x), len(g)) for x, g in factors.values()):
        raise ValueError(f"n_lora is {n_lora}, but no factor has that side")


def decomposed(factors: Factors, device: torch.device | str) -> KronEigen:
    """Return the blocks ``gradient factor ⊗ input factor`` in the order of the factors.

    Args:
        factors: From `calculate_kronecker_factors`.
        device: Where the result goes.
    """
    blocks: list[list[Side]] = [
        [_eigen(grads).to(device), _eigen(inputs).to(device)] for inputs, grads in factors.values()
    ]
    return KronEigen(blocks)


def _eigen(factor: Tensor) -> Eigen:
    version, eigen = _EIGEN.get(factor, (None, None))
    if eigen is None or version != factor._version:
        wide = factor.detach().to(torch.promote_types(torch.float32, factor.dtype))
        if factor.shape[0] == factor.shape[1]:
            eigen = DenseFactor(wide).decompose()
        else:
            vectors, singular, _ = torch.linalg.svd(wide.double(), full_matrices=False)
            eigen = Eigen(vectors.to(wide), singular.square().to(wide), wide.new_zeros(()))
        _EIGEN[factor] = (factor._version, eigen)
    return eigen
