"""The softmax of Gaussian logits, integrated over its contrasts without random numbers.

A softmax does not see a shift of all logits, so the logits of classes 2 to C relative to the first
are all there is to integrate over: one variable for two classes, see `sigmoid`, ``C − 1`` for more,
at scrambled Sobol' points.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.quasirandom import SobolEngine

from laplace_lora.likelihoods.sigmoid import NOT_POSITIVE, binary_log_probabilities

WIDTHS = (2.0, 12.0, 50.0, math.inf)  # largest variance of a contrast
POINTS = (  # contrasts up to which, and points for each of the widths
    (2, (2**9, 2**11, 2**11, 2**12)),
    (5, (2**10, 2**12, 2**13, 2**15)),
    (math.inf, (2**10, 2**14, 2**16, 2**17)),
)
ENTROPY_POINTS = 2**10
CHUNK = 2**24  # numbers in an accelerator's memory at once
CACHED = 2**18  # and in a processor's cache, several times as fast as its memory


def softmax_log_probabilities(
    contrasts: Tensor, covariance: Tensor, points: int | None = None
) -> Tensor:
    """Return ``log E[softmax((0, f))]`` for Gaussian contrasts ``f``.

    Args:
        contrasts: Mean contrasts to the first class, ``(…, classes − 1)``.
        covariance: Their covariance, ``(…, classes − 1, classes − 1)``.
        points: Sobol' points, a power of two; ``None`` takes more for more classes and wider
            Gaussians, so that errors stay below 2e-3 for up to 20 classes.

    Returns:
        Shape ``(…, classes)``. The same inputs give the same result, whatever else is in the batch.

    Raises:
        FloatingPointError: If a covariance is not finite or far from positive.
    """
    contrasts, covariance = _broadcast(contrasts, covariance)
    if contrasts.shape[-1] == 1:
        return binary_log_probabilities(contrasts[..., 0], covariance[..., 0, 0])
    shape, size = contrasts.shape[:-1], contrasts.shape[-1]
    mean, matrix = contrasts.reshape(-1, size), covariance.reshape(-1, size, size)
    if points is not None:
        return _averaged(mean, matrix, points).reshape(*shape, size + 1)
    widest = matrix.detach().diagonal(dim1=-2, dim2=-1).amax(-1)
    widest = widest.nan_to_num(math.inf)  # of NaN, which `covariance_root` refuses
    result = mean.new_zeros(len(mean), size + 1)
    by_width = next(by_width for largest, by_width in POINTS if size <= largest)
    most = 2 ** int(math.log2(CHUNK // (size + 1)))  # fewer than enough from 128 classes on
    below = -math.inf
    for limit, enough in zip(WIDTHS, by_width, strict=True):
        index = ((widest > below) & (widest <= limit)).nonzero().squeeze(-1)
        if len(index):
            values = _averaged(mean[index], matrix[index], min(enough, most))
            result = result.index_put((index,), values)
        below = limit
    return result.reshape(*shape, size + 1)


def normal_points(points: int, dimensions: int, seed: int = 0) -> Tensor:
    """Return scrambled Sobol' points of a standard normal, ``(points, dimensions)``, float64.

    Args:
        points: Their number, a power of two.
        dimensions: Length of each.
        seed: Of the scrambling.
    """
    return _normal_points(points, dimensions, seed).clone()


@lru_cache(maxsize=16)
def _normal_points(points: int, dimensions: int, seed: int) -> Tensor:
    engine = SobolEngine(dimensions, scramble=True, seed=seed)
    uniform = engine.draw(points, dtype=torch.float64)
    return cast(Tensor, torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12)))


def averaged(samples: Tensor) -> Tensor:
    """Return the log of the mean probabilities of samples, from logs ``(samples, …, classes)``."""
    average: Tensor = samples.logsumexp(0) - math.log(len(samples))
    return average.clamp(max=0)  # which rounding may exceed


def averaged_at(samples: Tensor, y: Tensor) -> Tensor:
    """Return the log of the mean probability of all labels of each row together, ``(rows,)``.

    Args:
        samples: Log probabilities under each sample, ``(samples, rows, …, classes)``.
        y: Labels, ``(rows, …)``; those of a row are independent under a sample.
    """
    index = y.unsqueeze(-1).expand(*samples.shape[:-1], 1)
    return averaged(samples.gather(-1, index).flatten(2).sum(-1))


def _averaged(mean: Tensor, covariance: Tensor, points: int) -> Tensor:
    """Average the softmax over points; ``mean`` has shape ``(n, classes − 1)``."""
    noise = _normal_points(points, mean.shape[-1], 0).to(mean)
    root = covariance_root(covariance)
    at_once = CACHED if mean.device.type == "cpu" else CHUNK
    part = max(1, at_once // (points * (mean.shape[-1] + 1)))
    return torch.cat(
        [
            averaged(log_softmax_at(noise, m, L))
            for m, L in zip(mean.split(part), root.split(part), strict=True)
        ]
    )


def log_softmax_at(noise: Tensor, contrasts: Tensor, root: Tensor) -> Tensor:
    """Return the log softmax of Gaussian contrasts at points of a standard normal.

    Args:
        noise: The points, ``(points, classes − 1)``.
        contrasts: Mean contrasts to the first class, ``(…, classes − 1)``.
        root: Root of their covariance, ``(…, classes − 1, classes − 1)``, see `covariance_root`;
            leading dimensions broadcast.

    Returns:
        Shape ``(points, …, classes)``. Classes come first in memory and points last, where a
        softmax is several times as fast.

    Raises:
        ValueError: If the points are of another number of classes.
    """
    check_noise(noise, root)
    contrasts, root = _broadcast(contrasts, root.to(contrasts.dtype))
    draws = torch.einsum("...ij,sj->i...s", root, noise.to(root.dtype))
    draws = draws + contrasts.movedim(-1, 0).unsqueeze(-1)
    log_p = F.log_softmax(torch.cat([torch.zeros_like(draws[:1]), draws]), dim=0)
    return log_p.movedim((0, -1), (-1, 0))


def check_noise(noise: Tensor, root: Tensor) -> None:
    """Refuse points of another dimension than a covariance has.

    A product would take points of one dimension for all of them.

    Args:
        noise: Points of a standard normal, ``(points, n)``.
        root: Root of a covariance, ``(…, n, n)``.

    Raises:
        ValueError: If they do not go together.
    """
    if noise.shape[-1] != root.shape[-1]:
        raise ValueError(
            f"samples of {noise.shape[-1]} variables meet a covariance of {root.shape[-1]}; draw "
            "them for as many classes or outputs as there are"
        )


def covariance_root(covariance: Tensor) -> Tensor:
    """Return lower triangular ``L`` with ``L Lᵀ`` a covariance, ``(…, n, n)``, in float64.

    Differentiable; a covariance that is singular or slightly indefinite from rounding is no
    obstacle.

    Raises:
        FloatingPointError: If it is not finite, or far from positive.
    """
    wide = covariance.double()
    size = wide.detach().diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp(min=1e-30)
    eye = torch.eye(wide.shape[-1], dtype=wide.dtype, device=wide.device)
    jitter = torch.full_like(size, 1e-12)
    root, failed = torch.linalg.cholesky_ex(wide + jitter * size * eye)
    while bool(failed.any()) and bool(jitter.max() < 1):
        jitter = jitter * torch.where(failed > 0, 100, 1)[..., None, None]
        root, failed = torch.linalg.cholesky_ex(wide + jitter * size * eye)
    if bool(failed.any()):
        raise FloatingPointError(NOT_POSITIVE)
    return cast(Tensor, root)


def _broadcast(mean: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    shape = torch.broadcast_shapes(mean.shape[:-1], covariance.shape[:-2])
    return mean.expand(*shape, -1), covariance.expand(*shape, *covariance.shape[-2:])
