"""Cholesky roots of factors, as bayesian_lora's scripts keep them, and telling them apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from laplace_lora.models.changes.autocast import in_full_precision

GROWTH = 1.1  # of the stabilising terms from one attempt to the next
ASYMMETRY = 0.01  # of a covariance that was summed or stored in half precision


@in_full_precision
def stable_cholesky(
    K: Tensor, mult_eps: float = 1e-8, abs_eps: float = 1e-8, max_tries: int = 1000
) -> Tensor:
    """Return the lower Cholesky root of a matrix that may be singular.

    The diagonal is multiplied by ``1 + mult_eps`` and raised by ``abs_eps``, both a little more in
    each attempt.

    Args:
        K: Symmetric, positive semidefinite, ``(…, d, d)``.
        mult_eps: Relative addition to the diagonal.
        abs_eps: Absolute addition to the diagonal.
        max_tries: Attempts.

    Raises:
        ValueError: If no attempt succeeds.
    """
    diagonal = torch.diag_embed(K.diagonal(dim1=-2, dim2=-1))
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    root: Tensor
    for attempt in range(max_tries):
        scale = GROWTH**attempt
        raised = K + scale * (mult_eps * diagonal + abs_eps * eye)
        root, failed = torch.linalg.cholesky_ex(raised)
        if not bool(failed.any()):
            return root
    raise ValueError(f"the matrix of shape {tuple(K.shape)} has no Cholesky decomposition")


@in_full_precision
def cholesky_decompose_small_factors(
    factors: Mapping[str, tuple[Tensor, Tensor]],
    lr_threshold: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return factors with Cholesky roots in place of small covariances.

    `model_evidence` and `variance` take such roots as well: a script that keeps them may go on
    doing so, and one that does not call this function has the same results.

    A root that is diagonal, as those of length 1 are, looks like a covariance, so it is returned
    with a negative sign: ``R Rᵀ`` is the same, and no covariance has a negative diagonal. Copies
    and files of the factors keep the sign.

    Args:
        factors: From `calculate_kronecker_factors`; left as they are.
        lr_threshold: Factors with fewer rows are decomposed.
        device: Where the result is kept.
        dtype: In which it is kept.
    """

    def small(factor: Tensor) -> Tensor:
        is_square = factor.shape[0] == factor.shape[1]
        if factor.shape[0] >= lr_threshold or not is_square:
            return factor.to(device, dtype)
        root = stable_cholesky(factor.double())
        return (-root if _is_diagonal(root) else root).to(device, dtype)

    return {name: (small(x), small(grads)) for name, (x, grads) in factors.items()}


def sides_with_roots(factors: Mapping[str, tuple[Tensor, Tensor]]) -> int:
    """Return up to which length square factors are Cholesky roots; 0 if none is one.

    A triangular matrix that is not diagonal is no covariance, so it is a root, and so is one with a
    negative diagonal, see `cholesky_decompose_small_factors`. Any other diagonal one, of length 1
    for instance, may be either: it is taken for what the others of its length or longer are, and
    for a covariance where these do not tell.

    Args:
        factors: Covariances or roots, by module.

    Raises:
        ValueError: If a square factor is neither, or covariances and roots are mixed.
    """
    roots: list[int] = []
    covariances: list[int] = []
    for name, pair in factors.items():
        for factor in pair:
            if factor.shape[0] != factor.shape[1]:
                continue
            if _is_diagonal(factor):
                if bool((factor.diagonal() < 0).any()):
                    roots.append(len(factor))
                continue
            upper, lower = factor.detach().triu(1), factor.detach().tril(-1)
            if not bool(upper.any()):
                roots.append(len(factor))
            elif bool((upper.T - lower).norm() <= ASYMMETRY * factor.detach().norm()):
                covariances.append(len(factor))
            else:
                raise ValueError(
                    f"a factor of {name!r} is neither a covariance, which is symmetric, nor a "
                    "lower Cholesky root"
                )
    longest = max(roots, default=0)
    if any(length <= longest for length in covariances):
        raise ValueError(
            f"of the factors up to length {longest} some are covariances and some Cholesky roots; "
            "decompose all with `cholesky_decompose_small_factors`, or none"
        )
    return longest


def _is_diagonal(factor: Tensor) -> bool:
    return not bool((factor.detach() - factor.detach().diagonal().diag()).any())
