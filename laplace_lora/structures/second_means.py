"""Which factor of a weight is the mean over the data, in curvatures that earlier versions saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from laplace_lora.curvature.engine import Engine
from laplace_lora.curvature.kron_protocol import LowRankKron, LowRankKronDecomposed
from laplace_lora.linalg.eigen import Eigen
from laplace_lora.linalg.factors import map_shared
from laplace_lora.linalg.kron_block import Side
from laplace_lora.structures.kron import KronCurvature

MEANS = "mean_factors"
SECOND = "second"

X = TypeVar("X")


def with_second_means(engine: Engine, curvature: Any, saved: Mapping[str, Any], n: int) -> Any:
    """Return a curvature of which the second factor of each weight is the mean over the data.

    Earlier versions took the first for weights that are stored as ``(in, out)``, and did not say
    so. The product of the two is the same.

    Args:
        engine: The model, which knows how its weights are stored.
        curvature: What was read.
        saved: What was read with it; `MEANS` is `SECOND` in that of this version.
        n: Number of examples.
    """
    turned = [engine.maps[block.map].transposed and not block.is_bias for block in engine.blocks]
    is_as_today = saved.get(MEANS) == SECOND or not any(turned)
    if is_as_today or not isinstance(curvature, KronCurvature):
        return curvature
    eigen = curvature.eigen
    kfacs = _scaled(curvature.factors.kfacs, turned, n, lambda x, scalar: x * scalar)
    sides = _scaled(eigen.blocks, turned, n, _times)
    factors = LowRankKron(kfacs, curvature.factors.residual)
    return KronCurvature(factors, LowRankKronDecomposed(sides, tables=eigen.tables))


def _scaled(
    blocks: Sequence[list[X]], turned: Sequence[bool], n: int, times: Callable[[X, float], X]
) -> list[list[X]]:
    """Return the blocks with the first of some pairs times ``n``, the second divided by it."""
    pairs = [block for block, is_turned in zip(blocks, turned, strict=True) if is_turned]
    firsts = map_shared([pair[:1] for pair in pairs], lambda x: times(x, n))
    seconds = map_shared([pair[1:] for pair in pairs], lambda x: times(x, 1 / n))
    scaled = ([*first, *second] for first, second in zip(firsts, seconds, strict=True))
    return [
        next(scaled) if is_turned else block
        for block, is_turned in zip(blocks, turned, strict=True)
    ]


def _times(side: Side, scalar: float) -> Side:
    assert isinstance(side, Eigen)  # a weight has no diagonal side that is stored as (in, out)
    # A bias has the other one's, and two names for one tensor cannot be saved.
    vectors = side.vectors.clone()
    return replace(
        side, vectors=vectors, values=side.values * scalar, residual=side.residual * scalar
    )
