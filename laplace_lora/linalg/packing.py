"""Pack Kronecker factors and their eigendecompositions into named tensors, and unpack them.

A factor that several blocks share is packed once. Compactly packed, a factor has no sums, which
take most of the room: they are rebuilt from its eigenpairs, whose vectors are kept as float16.
Eigenvalues and traces keep their digits, so a log determinant is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from laplace_lora.linalg.eigen import DiagonalEigen, Eigen
from laplace_lora.linalg.factor_spec import FactorSpec
from laplace_lora.linalg.factors import DenseFactor, DiagonalFactor
from laplace_lora.linalg.finite import check_diagonal
from laplace_lora.linalg.kron import KronFactors
from laplace_lora.linalg.kron_block import Side
from laplace_lora.linalg.kron_eigen import KronEigen
from laplace_lora.linalg.rounded import FLOAT16, check_orthonormal, orthonormal
from laplace_lora.linalg.sketch import Factor, LowRankFactor, sketch_columns

EIGEN = ("vectors", "values", "residual")
SUMS = {DenseFactor: ["matrix"], LowRankFactor: ["sketch", "trace"], DiagonalFactor: ["diagonal"]}
TABLE = "eigenvalues"  # prefix of a block's corrected eigenvalues


def pack_kron(
    factors: KronFactors, decomposed: KronEigen, exact: bool
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Return factors and eigenpairs as tensors, and for each block the numbers of its factors.

    Args:
        factors: The sums.
        decomposed: Their eigendecompositions.
        exact: Whether all numbers are kept, or sums are left out and eigenvectors rounded.
    """
    numbers: dict[int, int] = {}
    tensors: dict[str, Tensor] = {}
    for block, sides in zip(factors.kfacs, decomposed.blocks, strict=True):
        for factor, eigen in zip(block, sides, strict=True):
            if id(factor) in numbers:
                continue
            number = numbers[id(factor)] = len(numbers)
            parts = dict(zip(SUMS[type(factor)], factor.tensors(), strict=True))
            if not isinstance(eigen, DiagonalEigen):
                parts |= {name: getattr(eigen, name) for name in EIGEN}
                if not exact:
                    parts = {name: parts[name] for name in (*EIGEN, "trace") if name in parts}
                    parts["vectors"] = eigen.vectors.to(FLOAT16)
            tensors |= {f"{number}.{name}": tensor for name, tensor in parts.items()}
    for i, table in enumerate(decomposed.tables or []):
        tensors[f"{TABLE}.{i}"] = table
    return tensors, [[numbers[id(factor)] for factor in block] for block in factors.kfacs]


def unpack_kron(
    tensors: Mapping[str, Tensor],
    blocks: object,
    shapes: Sequence[Sequence[int]],
    diagonal: Sequence[Sequence[bool | None]],
    spec: FactorSpec,
    corrected: bool,
) -> tuple[list[list[Factor]], KronEigen]:
    """Return factors and eigendecompositions from tensors that are known to be finite.

    Args:
        tensors: The tensors, as packed by `pack_kron`.
        blocks: Numbers of each block's factors, read from a file and not validated yet.
        shapes: For each block the lengths of its sides.
        diagonal: For each block whether its sides are diagonals; ``None`` if one may be, which
            earlier versions kept as the others.
        spec: Which factors are low-rank, and their rank.
        corrected: Whether the eigenvalues are corrected.

    Raises:
        ValueError: If numbers or shapes do not fit, or an eigenvalue is negative.
        KeyError: If a tensor is missing.
    """
    if not isinstance(blocks, list) or [len(b) for b in blocks] != [len(s) for s in shapes]:
        raise ValueError("the blocks do not fit the model's tensors")
    unpacked: dict[int, tuple[Factor, Side]] = {}
    for block, sides, kinds in zip(blocks, shapes, diagonal, strict=True):
        for number, d, exact in zip(block, sides, kinds, strict=True):
            if type(number) is not int:
                raise ValueError(f"a factor is numbered {number!r}")
            if number not in unpacked:
                unpacked[number] = _unpacked(tensors, number, spec.rank)
                check_diagonal(unpacked[number][0].tensors()[-1])  # of a sketch: its trace
            factor = unpacked[number][0]
            if factor.d != d:
                raise ValueError(f"factor {number} has side {factor.d}, not {d}")
            if exact not in (None, isinstance(factor, DiagonalFactor)):
                raise ValueError(f"factor {number} is of the wrong kind")
    tables = {f"{TABLE}.{i}" for i in range(len(blocks))} if corrected else set()
    used = {f"{number}." for number in unpacked}
    unused = [
        name for name in tensors if name not in tables and f"{name.split('.')[0]}." not in used
    ]
    if unused:
        raise ValueError(f"tensor {unused[0]!r} belongs to no block")
    kfacs = [[unpacked[number][0] for number in block] for block in blocks]
    decomposed = KronEigen([[unpacked[number][1] for number in block] for block in blocks])
    if corrected:
        decomposed = decomposed.with_tables(_tables(tensors, decomposed))
    return kfacs, decomposed


def _tables(tensors: Mapping[str, Tensor], basis: KronEigen) -> list[Tensor]:
    tables = [tensors[f"{TABLE}.{i}"] for i in range(len(basis))]
    for i, table in enumerate(tables):
        if table.shape != basis.table(i).shape:
            raise ValueError(f"the corrected eigenvalues of block {i} do not fit its factors")
        if bool((table < 0).any()):
            raise ValueError(f"block {i} has a negative eigenvalue")
    return tables


def diagonal_blocks(tensors: Mapping[str, Tensor], blocks: object) -> set[int]:
    """Return which blocks were packed as diagonals.

    Args:
        tensors: The tensors, as packed by `pack_kron`.
        blocks: Numbers of each block's factors, read from a file and not validated yet.
    """
    packed = list(blocks) if isinstance(blocks, list) else []
    return {
        i
        for i, block in enumerate(packed)
        if isinstance(block, list) and len(block) == 1 and f"{block[0]}.diagonal" in tensors
    }


def _unpacked(tensors: Mapping[str, Tensor], number: int, rank: int | None) -> tuple[Factor, Side]:
    if f"{number}.diagonal" in tensors:
        sums = tensors[f"{number}.diagonal"]
        if sums.ndim != 1:
            raise ValueError(f"factor {number} is not a diagonal")
        return DiagonalFactor(sums), DiagonalFactor(sums).decompose()
    eigen = _eigen(tensors, number)
    if tensors[f"{number}.vectors"].dtype == FLOAT16:
        return _rebuilt(eigen, tensors.get(f"{number}.trace"), number, rank), eigen
    factor: Factor
    if f"{number}.matrix" in tensors:
        factor = DenseFactor(tensors[f"{number}.matrix"])
        expected, k = (factor.d, factor.d), factor.d
        shape = factor.matrix.shape
    else:
        k = int(rank or 0)
        factor = LowRankFactor(tensors[f"{number}.sketch"], tensors[f"{number}.trace"], k)
        expected, shape = (factor.d, sketch_columns(k)), factor.sketch.shape
    if shape != expected or eigen.vectors.shape != (factor.d, k) or factor.trace.shape != ():
        raise ValueError(f"the tensors of factor {number} do not fit together")
    return factor, eigen


def _rebuilt(eigen: Eigen, trace: Tensor | None, number: int, rank: int | None) -> Factor:
    """Return the sums that eigenpairs stand for, which were packed without them."""
    k = eigen.vectors.shape[1]
    if trace is None and eigen.multiplicity == 0:
        return DenseFactor.of(eigen)
    if trace is not None and trace.shape == () and k == rank and sketch_columns(k) < eigen.d:
        return LowRankFactor.of(eigen, trace)
    raise ValueError(f"the tensors of factor {number} do not fit together")


def _eigen(tensors: Mapping[str, Tensor], number: int) -> Eigen:
    vectors, values, residual = (tensors[f"{number}.{name}"] for name in EIGEN)
    if values.shape != vectors.shape[1:] or vectors.ndim != 2 or residual.shape != ():
        raise ValueError(f"the tensors of factor {number} do not fit together")
    if bool((values < 0).any()) or bool(residual < 0):
        raise ValueError(f"factor {number} has a negative eigenvalue")
    if vectors.dtype == FLOAT16:
        vectors = orthonormal(vectors, values.dtype)
    else:  # with others, variances are those of another matrix
        check_orthonormal(vectors)
    return Eigen(vectors, values, residual)
